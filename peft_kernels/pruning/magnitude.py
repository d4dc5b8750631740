"""Magnitude pruning: what is smallest goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peft_kernels.formats.mask import PackedMask
from peft_kernels.pruning._scores import check_finite_scores, magnitudes
from peft_kernels.pruning._select import check_amount, select
from peft_kernels.pruning._targets import weights_of


def magnitude_masks(
    model: Any,
    sparsity: float | None = None,
    scope: str = "global",
    *,
    n_of_m: tuple[int, int] | None = None,
    block: tuple[int, int] | None = None,
    within: Mapping[str, PackedMask] | None = None,
    targets: Iterable[str] | None = None,
    check: bool = False,
) -> dict[str, PackedMask]:
    """Masks of the weights of largest absolute value (Han et al. 2015, "Learning both Weights and Connections",
    https://arxiv.org/abs/1506.02626). Nothing is changed in the model, nothing waits for the device.

    `thresholds` says how the weights are found and which of equal ones. How many: total - round(sparsity · total),
    halves rounded to even, of all weights together, of each layer or of each row. A layer may lose all its weights to
    a global threshold: that is a defined result, and `sparsity_report` names such layers.

    Args:
        model: a model, of which `nn.Linear` and this library's linear layers count, without the output embeddings; or
            weights [out_features, in_features] by name, dense or `NF4Weight`.
        sparsity: share of the weights to prune, in [0, 1]; of blocks with `block`.
        scope: "global", "layer" or "row": what is ranked together.
        n_of_m: (n, m) keeps n of every m consecutive weights of a row instead, as `keep_n_of_m`.
        block: (rows, columns) prunes whole blocks, by their mean absolute value.
        within: masks by name: what they prune stays pruned, and counts as pruned. (Weights that are 0 without being
            pruned would be as good as pruned ones.)
        targets: names of the layers, or their endings after a dot; None takes all.
        check: raise where a weight is not finite, which waits for the device once. Otherwise infinities rank as the
            largest, and NaN is pruned.

    Returns:
        A `PackedMask` by name, on the device of each weight.

    Raises:
        ValueError: no such sparsity, scope, group or block; nothing to prune; weights that are not finite, by `check`.
        TypeError: an argument is of the wrong type.
    """
    where = "magnitude_masks"
    check_amount(where, sparsity, scope, n_of_m, block)
    weights = weights_of(where, model, targets)
    scores = {name: magnitudes(weight, f"{where}: {name}") for name, weight in weights.items()}
    if check:
        check_finite_scores(where, scores)
    return select(scores, sparsity, scope, n_of_m, block, within)
