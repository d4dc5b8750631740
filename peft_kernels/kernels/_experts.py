"""Adapters of a stack of experts as adapters of one layer: the virtual adapter a E + e is adapter a at expert e.

So an implementation of `multi_lora_linear` runs the low-rank part of a mixture of experts unchanged. (The idea is
vLLM's.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.formats.adapter_table import BASE, AdapterLists


def virtual_adapters(stacks: AdapterLists, experts: int) -> AdapterLists:
    """One for each adapter and expert: views of the stacks [E, r, K] and [E, N, r], those of a stack side by side."""
    each = range(experts)
    return AdapterLists(
        [matrix for stack in stacks.lora_As for matrix in stack.unbind(0)],
        [matrix for stack in stacks.lora_Bs for matrix in stack.unbind(0)],
        [output for output in stacks.outputs for _ in each],
        [adapter * experts + e for adapter in stacks.adapters for e in each],
        [scaling for scaling in stacks.scalings for _ in each],
        stacks.widths,
        stacks.count * experts,
    )


def virtual_ids(ids: Tensor, offsets: Tensor) -> Tensor:
    """Of ids [M, k] where the rows up to offsets[0] are expert 0's, and so on; -1 where a row is nobody's."""
    row = torch.arange(ids.shape[0], dtype=offsets.dtype, device=ids.device)
    expert = torch.searchsorted(offsets, row, right=True).unsqueeze(1)
    return torch.where((ids >= 0) & (expert < len(offsets)), ids * len(offsets) + expert, BASE)


def repeated(values, experts: int) -> list:
    """Of each adapter, for each of its virtual ones."""
    return [value for value in values for _ in range(experts)]


def restacked(grads, experts: int) -> list[Tensor | None]:
    """The gradients of the stacks, of those of the views."""
    groups = (grads[i : i + experts] for i in range(0, len(grads), experts))
    return [None if group[0] is None else torch.stack(list(group)) for group in groups]
