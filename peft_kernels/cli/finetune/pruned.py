"""`--method pruned`: what is pruned before the training, and what is left on disk after it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_kernels import MaskedLoRALinear
from peft_kernels.cli.finetune.model import fused_layers
from peft_kernels.formats import sparse
from peft_kernels.formats.mask import PackedMask
from peft_kernels.functional import mask_apply_
from peft_kernels.nn._layers import is_conv1d
from peft_kernels.pruning import magnitude_masks


@torch.no_grad()
def prune(model: nn.Module, targets: Iterable[str], sparsity: float) -> dict[str, PackedMask]:
    """Sets the smallest weights of each layer named to 0, in place.

    Args:
        model: without adapters.
        targets: names of linear layers, or their endings after a dot.
        sparsity: share of the weights that goes, of each layer.

    Returns:
        What is kept, by the layer's name.
    """
    masks = magnitude_masks(model, sparsity, "layer", targets=targets)
    for name, mask in masks.items():
        layer: Any = model.get_submodule(name)
        mask_apply_(layer.weight.t() if is_conv1d(layer) else layer.weight, mask)
    return masks


@torch.no_grad()
def save_merged(model: nn.Module, path: Path, adapter: Path) -> dict[str, float | int]:
    """Writes the pruned layers, merged, as one bit a weight and the nonzeros. The model stays as it is.

    Args:
        model: with trained adapters in pruned layers.
        path: of the file.
        adapter: the file of the adapter, for its size.

    Returns:
        sparsity_after_merge: share of the merged weights that is exactly 0; pruned_weights: how many there are;
        dense_bytes, pruned_file_bytes, adapter_file_bytes: what they take as they are, and on disk.
    """
    layers = {name: layer for name, layer in fused_layers(model).items() if isinstance(layer, MaskedLoRALinear)}
    merged = {name: layer.merged_weight() for name, layer in layers.items()}
    sparse.save(
        {name: sparse.compress(weight, "bitmap", mask=layers[name].mask) for name, weight in merged.items()}, path
    )
    count = sum(weight.numel() for weight in merged.values())
    return {
        "sparsity_after_merge": sum(int((weight == 0).sum()) for weight in merged.values()) / count,
        "pruned_weights": count,
        "dense_bytes": sum(weight.nbytes for weight in merged.values()),
        "pruned_file_bytes": path.stat().st_size,
        "adapter_file_bytes": adapter.stat().st_size,
    }


def summary(figures: dict[str, float | int], path: Path) -> str:
    """What `save_merged` returned, for the screen."""
    mebibytes = {name: f"{figures[name] / 2**20:.1f} MiB" for name in figures if name.endswith("_bytes")}
    return (
        f"After merging {100 * figures['sparsity_after_merge']:.2f} % of {figures['pruned_weights']:,} weights are 0; "
        f"as bits and nonzeros they take {mebibytes['pruned_file_bytes']} ({path}), dense {mebibytes['dense_bytes']}; "
        f"the adapter takes {mebibytes['adapter_file_bytes']}"
    )
