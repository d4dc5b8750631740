"""Peak and kept bytes of a training step of 12 Llama blocks with adapters on every linear layer: PEFT's and ours.

    python -m benchmarks.block_memory [--json FILE]

The models have the same weights; before they are measured, output and gradients without dropout are compared with
float64 by the accuracy rule. With dropout PEFT keeps masks and dropped-out copies: the bar is that the peak of ours is
lower by at least that much (what PEFT keeps with dropout less what it keeps without). The exit code is 1 when it is
missed.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import peft_kernels
from benchmarks import memory
from peft_kernels._table import table
from peft_kernels.selfcheck import RATIO, relative_error

LAYERS, R, ALPHA = 12, 16, 32.0
DROPOUTS = (0.0, 0.05)
PEFT, OURS, ACCELERATED, FROZEN = "peft", "ours (add_lora)", "peft accelerated", "frozen"
HEADERS = ("model", "dropout", "kept MiB", "peak MiB")


@dataclass(frozen=True)
class Size:
    """Tokens of a batch, the width of the blocks, of their MLPs, heads and heads of k and v."""

    tokens: int = 512
    hidden: int = 512
    intermediate: int = 1408
    heads: int = 8
    kv_heads: int = 4
    layers: int = LAYERS

    @staticmethod
    def here() -> Size:
        return Size(8192, 4096, 14336, 32, 8) if torch.cuda.is_available() else Size()


@dataclass(frozen=True)
class Record:
    peer: str
    dropout_p: float
    kept_bytes: int
    peak_bytes: int


def base_model(size: Size, device: str, dtype: torch.dtype) -> nn.Module:
    """Blocks of transformers' Llama with random weights, frozen, in training mode."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8, hidden_size=size.hidden, intermediate_size=size.intermediate, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, use_cache=False,
        max_position_embeddings=size.tokens,
    )  # fmt: skip
    with torch.device(device):
        return LlamaModel(config).to(dtype).requires_grad_(False).train()


def adapted(base: nn.Module, dropout_p: float) -> dict[str, nn.Module]:
    """The models by peer; all adapters have PEFT's numbers, with a B that is not zero."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=dropout_p, target_modules=targets)
    peft = inject_adapter_in_model(config, copy.deepcopy(base)).train()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5
            parameter.data.copy_(values)
    accelerated = copy.deepcopy(peft)
    peft_kernels.accelerate(accelerated)
    ours = copy.deepcopy(base)
    dtype = next(parameter.dtype for name, parameter in peft.named_parameters() if "lora_" in name)
    peft_kernels.add_lora(ours, R, targets, lora_alpha=ALPHA, lora_dropout=dropout_p, adapter_dtype=dtype)
    for name, parameter in adapter_parameters(ours).items():
        parameter.data.copy_(adapter_parameters(peft)[name].data)
    return {FROZEN: base, PEFT: peft, ACCELERATED: accelerated, OURS: ours.train()}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A and B by the names that ours and PEFT's have in common, sorted."""
    found = {
        name.replace(".default", "").replace("base_layer.", "").removesuffix(".weight"): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    return dict(sorted(found.items()))


def step_of(model: nn.Module, x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward: y, dx and the gradients of the adapters."""
    leaves = [x, *adapter_parameters(model).values()]

    def step() -> tuple[Tensor, ...]:
        y = model(inputs_embeds=x).last_hidden_state
        return y.detach(), *torch.autograd.grad(y.float().square().mean(), leaves)

    return step


def check(models: dict[str, nn.Module], x: Tensor) -> None:
    """Raises AssertionError where ours is less accurate than the rule allows, measured by PEFT's own error."""
    wide = copy.deepcopy(models[PEFT]).double()
    truth = step_of(wide, x.detach().double().requires_grad_())()
    peft = step_of(models[PEFT], x)()
    for peer in (ACCELERATED, OURS):
        found = step_of(models[peer], x)()
        for part in (slice(0, 1), slice(1, 2), slice(2, None)):
            value, eager, exact = (torch.cat([t.double().flatten() for t in ts[part]]) for ts in (found, peft, truth))
            error, allowed = relative_error(value, exact), relative_error(eager, exact)
            assert error <= RATIO * allowed, f"{peer} is wrong: error {error:.2e}, PEFT has {allowed:.2e}"


def measure(size: Size, device: str, dtype: torch.dtype) -> list[Record]:
    """Kept and peak bytes of each model at each dropout probability, after the check."""
    records = []
    generator = torch.Generator(device).manual_seed(2)
    x = torch.randn(1, size.tokens, size.hidden, generator=generator, device=device).to(dtype).requires_grad_()
    base = base_model(size, device, dtype)
    for p in DROPOUTS:
        models = adapted(base, p)
        if not p:
            check(models, x)
        for peer, model in models.items():
            step = step_of(model, x)
            step()  # what is allocated once, such as the tables of the rotary embedding
            fixed = [*model.parameters(), *model.buffers()]
            kept = memory.kept_bytes(lambda model=model: model(inputs_embeds=x).last_hidden_state, fixed)
            records.append(Record(peer, p, kept, memory.peak_bytes(step, device)))
    return records


def missing(records: list[Record], peer: str) -> int:
    """Bytes by which the peer misses the bar; 0 or less where it is met."""
    found = {(record.peer, record.dropout_p): record for record in records}
    without, with_dropout = (found[PEFT, p] for p in DROPOUTS)
    masks_and_copies = with_dropout.kept_bytes - without.kept_bytes
    return masks_and_copies - (with_dropout.peak_bytes - found[peer, DROPOUTS[1]].peak_bytes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    size = Size.here()
    records = measure(size, device, dtype)
    rows = [(r.peer, f"{r.dropout_p:g}", f"{r.kept_bytes / 2**20:.1f}", f"{r.peak_bytes / 2**20:.1f}") for r in records]
    print(table(rows, HEADERS))
    gaps = {peer: missing(records, peer) for peer in (ACCELERATED, OURS)}
    for peer, gap in gaps.items():
        print(
            f"{peer}: the bar at dropout {DROPOUTS[1]:g} is {'met' if gap <= 0 else 'missed'} ({-gap / 2**20:+.1f} MiB)"
        )
    if options.json:
        content = {"size": asdict(size), "dtype": str(dtype), "records": [asdict(record) for record in records]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return int(any(gap > 0 for gap in gaps.values()))


if __name__ == "__main__":
    sys.exit(main())
