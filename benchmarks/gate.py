"""No speed for a wrong result: a peer is compared with float64 before it is timed."""

from __future__ import annotations

import functools

import torch

from benchmarks.peers import Peer
from benchmarks.problems import Spec
from tests.helpers import assert_as_accurate_as_eager, assert_within_rounding

_SEED = 7
# Below this many outputs the ratio of two errors is a matter of luck, and each element is bounded instead.
_FEW_OUTPUTS = 1 << 14


class WrongResult(AssertionError):
    """The peer does not compute the layer's output or gradients, so that its time means nothing."""


@functools.lru_cache(maxsize=256)
def check(peer: Peer, spec: Spec) -> str:
    """Compares y, dx, dA and dB with the float64 oracle: by the accuracy rule with the peer's own factor, tiny problems
    element by element.

    Returns:
        What was compared: "exact mask" where the dropout mask is known or not needed, "at dropout 0" where the peer
        does not tell its mask.

    Raises:
        WrongResult: an error is larger than `peer.accuracy` times eager PyTorch's (tiny: than rounding), or not finite.
    """
    problem = spec.draw(zero_B=peer.frozen)
    layer = peer.build(problem)
    compared = "exact mask"
    if spec.dropout_p and layer.drop_mask is None:
        problem = spec.without_dropout().draw()
        layer = peer.build(problem)
        compared = "at dropout 0"
    elif spec.dropout_p:
        torch.manual_seed(_SEED)
        with layer.context():
            problem.drop_mask = layer.drop_mask()
    try:
        torch.manual_seed(_SEED)
        if spec.m * spec.n < _FEW_OUTPUTS:
            assert_within_rounding(problem, layer.result())
        else:
            assert_as_accurate_as_eager(problem, layer.result(), peer.accuracy)
    except AssertionError as error:
        raise WrongResult(f"{peer.name} is wrong on {spec.label}, so it is not timed: {error}") from error
    return compared
