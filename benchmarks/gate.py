"""No speed for a wrong result: a peer is compared with float64 before it is timed."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks.peers import Layer, Peer
from benchmarks.problems import Case, Spec
from tests.helpers import assert_as_accurate_as_eager, assert_within_rounding, named, relative_error

_SEED = 7
# Below this many outputs the ratio of two errors is a matter of luck, and each element is bounded instead.
_FEW_OUTPUTS = 1 << 14


class WrongResult(AssertionError):
    """The peer does not compute the layer's output or gradients, so that its time means nothing."""


@functools.lru_cache(maxsize=256)
def check(peer: Peer, spec: Spec) -> str:
    """Compares the outputs and all gradients with the float64 oracle: by the accuracy rule with the peer's own factor,
    tiny problems of `lora_linear` element by element.

    Returns:
        What was compared: "exact mask" where the dropout mask is known or not needed, "at dropout 0" where the peer
        does not tell its mask.

    Raises:
        WrongResult: an error is larger than `peer.accuracy` times eager PyTorch's (tiny: than rounding), or not finite.
    """
    try:
        return _check_layer(peer, spec) if spec.op == "lora_linear" else _check_case(peer, spec)
    except AssertionError as error:
        raise WrongResult(f"{peer.name} is wrong on {spec.label}, so it is not timed: {error}") from error


def _check_layer(peer: Peer, spec: Spec) -> str:
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
    torch.manual_seed(_SEED)
    if spec.m * spec.n < _FEW_OUTPUTS:
        assert_within_rounding(problem, layer.result())
    else:
        assert_as_accurate_as_eager(problem, layer.result(), peer.accuracy)
    return compared


def _check_case(peer: Peer, spec: Spec) -> str:
    compared = "exact mask"
    layer = peer.layer(spec)
    if spec.dropout_p and layer.checked is None and not peer.frozen:
        spec, compared = spec.without_dropout(), "at dropout 0"
        layer = peer.layer(spec)
    case = peer.problem(spec)
    results = named(layer.result())
    truth = _oracle(case, layer, torch.float64)
    eager = _oracle(case, layer, None)
    for name, value in results.items():
        assert value.dtype == eager[name].dtype, f"{name}: dtype {value.dtype}, eager has {eager[name].dtype}"
        error, allowed = relative_error(value, truth[name]), relative_error(eager[name], truth[name])
        floor = torch.finfo(value.dtype).eps / 4
        assert error <= max(peer.accuracy * allowed, floor), f"{name}: error {error:.3e}, eager has {allowed:.3e}"
    return compared


def _oracle(case: Case, layer: Layer, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Eager PyTorch's outputs and gradients for the layer's grad_y."""
    leaves = case.leaves(dtype)
    y = case.eager(leaves)
    if not any(leaf.requires_grad for leaf in layer.leaves.values()):
        return {"y": y}
    grads = layer.grad_y if isinstance(layer.grad_y, Tensor) else torch.cat(layer.grad_y, -1)
    wanted = [leaves[name] for name in layer.leaves]
    found = dict(zip(layer.leaves, torch.autograd.grad(y, wanted, grads.to(y.dtype)), strict=True))
    if isinstance(layer.grad_y, Tensor):
        return {"y": y.detach(), **found}
    outputs = y.detach().split([grad.shape[-1] for grad in layer.grad_y], -1)
    return {**{f"y.{j}": out for j, out in enumerate(outputs)}, **found}
