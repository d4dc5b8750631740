"""The optimizers of `finetune`: AdamW with its state in 32 or 8 bits, on the device or in paged memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.nn.parameter import Parameter

from peft_kernels.cli.errors import UsageError

Factory = Callable[..., torch.optim.Optimizer]


def _bitsandbytes(name: str) -> Factory:
    def make(parameters: list[Parameter], **options: float) -> torch.optim.Optimizer:
        try:
            import bitsandbytes as bnb
            from bitsandbytes.cextension import lib
        except ImportError as error:
            raise UsageError(
                f"{name} is an optimizer of bitsandbytes, which cannot be imported ({error}); "
                'install it with: pip install "peft-kernels[bnb]"'
            ) from error
        # Without this the first step would fail, after the model is loaded.
        elsewhere = {p.device.type for p in parameters} - ({"cpu", "cuda"} if lib.compiled_with_cuda else {"cpu"})
        if elsewhere:
            raise UsageError(
                f"{name} needs a bitsandbytes with kernels for {', '.join(sorted(elsewhere))}, which this installation "
                "does not have (`python -m bitsandbytes` says why); without them: --optim adamw"
            )
        return getattr(bnb.optim, name)(parameters, **options)

    return make


OPTIMIZERS: dict[str, Factory] = {
    "adamw": torch.optim.AdamW,
    "adamw8bit": _bitsandbytes("AdamW8bit"),
    "paged-adamw": _bitsandbytes("PagedAdamW"),
    "paged-adamw8bit": _bitsandbytes("PagedAdamW8bit"),
    "paged-adamw32bit": _bitsandbytes("PagedAdamW32bit"),
}


def make_optimizer(name: str, parameters: Iterable[Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """An AdamW over those parameters that require gradients.

    bitsandbytes keeps the state of parameters below 4096 elements in 32 bits, and pages that of parameters from 100 000
    elements on. On a CPU, whose memory is paged anyway, it says that it does not page.

    Args:
        name: one of `OPTIMIZERS`; all but "adamw" need bitsandbytes.
        parameters: those that do not require a gradient are left out.
        lr: the learning rate.
        weight_decay: decoupled, as AdamW's.

    Raises:
        ValueError: name is none of `OPTIMIZERS`, or no parameter requires a gradient.
        UsageError: bitsandbytes is not installed, or has no kernels for the parameters' device.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"make_optimizer: name is {name!r}; expected one of {', '.join(OPTIMIZERS)}")
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("make_optimizer: no parameter requires a gradient")
    return OPTIMIZERS[name](trained, lr=lr, weight_decay=weight_decay)
