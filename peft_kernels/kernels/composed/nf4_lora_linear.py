"""`nf4_lora_linear`: the base product by whichever implementation `nf4_linear` takes, then the low-rank updates of
`lora_linear` in place into its result."""

from __future__ import annotations

from peft_kernels.kernels.composed.lora_linear import backward, forward

__all__ = ["backward", "forward", "unsupported"]


def unsupported(problem) -> str | None:
    return None
