"""How many bytes a layer keeps between forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers import Layer


def saved_bytes(layer: Layer, parameters: list[Tensor]) -> int:
    """Bytes of all storages that autograd keeps for backward, x included, without those of `parameters`.

    A storage that is kept twice, or by two views, counts once.
    """
    known = {_storage(tensor) for tensor in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in known:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with layer.context(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer.call(layer.leaves["x"])
    del y
    return sum(kept.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
