"""What tests of several ops share: the accuracy rule and the bound on every element, against a float64 oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.problems import LoraProblem, Problem
from tests.problems.base import Result

__all__ = [
    "GRADS",
    "RATIO",
    "LoraProblem",
    "assert_as_accurate_as_eager",
    "assert_within_rounding",
    "named",
    "relative_error",
]

GRADS = ("x", "weight", "bias", "lora_A", "lora_B")
RATIO = 1.2


def relative_error(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth|| in float64 (Frobenius). NaN in `value` gives NaN, which passes no comparison."""
    value, truth = value.double().to(truth.device), truth.double()
    norm = truth.norm()
    return float((value - truth).norm() / norm) if norm > 0 else float((value - truth).norm())


def assert_as_accurate_as_eager(problem: Problem, result: Result, ratio: float = RATIO) -> None:
    """The accuracy rule: error against float64 at most `ratio` times that of PyTorch's eager composition, for the
    output and every gradient. A quarter of the dtype's eps is allowed where eager happens to be exact."""
    truths, eagers = named(problem.eager(torch.float64)), named(problem.eager())
    for name, value in named(result).items():
        truth, eager = truths[name], eagers[name]
        assert value.dtype == eager.dtype, f"{name}: dtype {value.dtype}, eager has {eager.dtype}"
        assert value.shape == eager.shape, f"{name}: shape {tuple(value.shape)}, eager has {tuple(eager.shape)}"
        error, allowed = relative_error(value, truth), relative_error(eager, truth)
        floor = torch.finfo(value.dtype).eps / 4
        assert error <= max(ratio * allowed, floor), f"{name}: error {error:.3e}, eager has {allowed:.3e}"


def assert_within_rounding(problem: Problem, result: Result) -> None:
    """Each single element of the output and of the gradients is within the rounding error that any sound order of the
    sums may have: |value - truth| <= (8 u + 4 sqrt(L) u32) T, where T is the same composition of absolute values, L the
    length of the sums, u and u32 the unit roundings of the dtype and of float32 accumulation (Higham and Mary, "A new
    approach to probabilistic rounding error analysis", 2019). Unlike a ratio to eager, this is sharp for tiny problems.
    """
    truth, terms = named(problem.eager(torch.float64)), named(problem.absolute().eager(torch.float64))
    for name, value in named(result).items():
        assert value.shape == truth[name].shape, f"{name}: shape {tuple(value.shape)}, not {tuple(truth[name].shape)}"
        dtype, wide = torch.finfo(problem.dtype), torch.finfo(torch.promote_types(problem.dtype, torch.float32))
        unit = max(dtype.eps, torch.finfo(value.dtype).eps) / 2
        underflow = 8 * problem.length * unit * dtype.tiny
        bound = (8 * unit + 4 * problem.length**0.5 * wide.eps / 2) * terms[name] + underflow
        excess = ((value.double() - truth[name]).abs() - bound).cpu()
        assert not excess.isnan().any(), f"{name}: NaN"
        assert excess.numel() == 0 or excess.max() <= 0, (
            f"{name}: an element is {float(excess.max()):.3e} past its bound"
        )


def named(result: Result) -> dict[str, Tensor]:
    """Outputs ("y", or "y.0", "y.1" of several) and gradients."""
    y, grads = result
    outputs = {"y": y} if isinstance(y, Tensor) else {f"y.{j}": out for j, out in enumerate(y)}
    return {**outputs, **grads}
