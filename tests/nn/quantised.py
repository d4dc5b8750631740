"""What tests of modules over 4-bit weights share."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import torch
from torch import Tensor, nn

from peft_kernels.formats.nf4 import NF4Weight


def bits(q: NF4Weight) -> list[bytes]:
    """Every byte that a weight is made of."""
    return [tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in q.tensors]


def same_bits(one: NF4Weight, two: NF4Weight) -> bool:
    facts = ("shape", "dtype", "blocksize", "first", "row_stride")
    return bits(one) == bits(two) and all(getattr(one, fact) == getattr(two, fact) for fact in facts)


def same_state(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def _through_a_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": _through_a_file,
}

MOVES: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "half": (lambda module: module.half(), torch.float16),
    "bfloat16": (lambda module: module.bfloat16(), torch.bfloat16),
    "to bfloat16": (lambda module: module.to(torch.bfloat16), torch.bfloat16),
    "to cpu and float16": (lambda module: module.to("cpu", torch.float16), torch.float16),
    "double": (lambda module: module.double(), torch.float64),
    "type": (lambda module: module.type(torch.float16), torch.float16),
}
