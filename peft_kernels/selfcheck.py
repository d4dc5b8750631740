"""Checks every implementation of every op on this machine, in seconds: `doctor`, `tune` and the benchmarks use it.

The accuracy rule: the relative Frobenius error against float64, of the output and of every gradient, is at most 1.2
times the error of PyTorch's own eager composition at the same dtypes (`problems`). Results must also be the same bits
when computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch, problems
from peft_kernels.problems import Case, Draw, Shape

RATIO = 1.2


@dataclass(frozen=True)
class Outcome:
    """What came of one implementation on one device.

    Attributes:
        op, backend, device: which.
        checked: number of cases computed.
        ratio: the largest error / eager's error; 0 when nothing was computed.
        failure: what is wrong, naming the case, or None.
        unavailable: why it computes nothing here, or None.
        objection: why it is not taken by default although it could run, or None.
    """

    op: str
    backend: str
    device: str
    checked: int = 0
    ratio: float = 0.0
    failure: str | None = None
    unavailable: str | None = None
    objection: str | None = None


def relative_error(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth|| in float64; NaN in `value` gives NaN, which passes no comparison."""
    value, truth = value.double(), truth.double()
    norm = truth.norm()
    return float((value - truth).norm() / norm) if norm > 0 else float((value - truth).norm())


def check(names: Iterable[str] | None = None, devices: Iterable[str] | None = None) -> list[Outcome]:
    """Runs the self-check.

    Args:
        names: ops; all of `dispatch.ORDER` when None.
        devices: "cpu", "cuda"; the CPU and, where PyTorch sees one, the GPU when None.

    Returns:
        One `Outcome` per device, op and backend, in the order in which dispatch prefers them.
    """
    if devices is None:
        devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    names = tuple(dispatch.ORDER if names is None else names)
    return [
        check_implementation(op, backend, list(cases(op, device)))
        for device in devices
        for op in names
        for backend in dispatch.ORDER[op]
    ]


def check_implementation(op: str, backend: str, cases: list[Case]) -> Outcome:
    """Runs one implementation on the cases that it supports."""
    device = cases[0].device
    checked, worst, refusals = 0, 0.0, []
    for case in cases:
        refusal = dispatch.objection(op, backend, case.problem, forced=True)
        if refusal is not None:
            refusals.append(refusal)
            continue
        try:
            ratio = _judge(case, backend)
        except Exception as error:  # a kernel that cannot be launched is a finding, not the end of the check
            failure = f"{case.label}: {type(error).__name__}: {str(error).strip().splitlines()[0:1]}"
            return Outcome(op, backend, device, checked, worst, failure=failure)
        worst, checked = max(worst, ratio), checked + 1
    if not checked:
        return Outcome(op, backend, device, unavailable=refusals[0])
    objection = dispatch.objection(op, backend, cases[0].problem)
    return Outcome(op, backend, device, checked, worst, objection=objection)


class Disagreement(AssertionError):
    """An implementation's result is not what the accuracy rule allows."""


def _judge(case: Case, backend: str) -> float:
    """The largest ratio to eager's error.

    Raises:
        Disagreement: the rule is broken.
    """
    return judge(run_op(case, backend), run_op(case, backend), Expected.of(case))


class Expected(NamedTuple):
    """What a case's results are judged by: the float64 truth, and eager PyTorch's results at the case's dtypes."""

    truth: dict[str, Tensor]
    eager: dict[str, Tensor]

    @staticmethod
    def of(case: Case) -> Expected:
        return Expected(_run_eager(case, torch.float64), _run_eager(case, None))


def judge(first: dict[str, Tensor], second: dict[str, Tensor], expected: Expected) -> float:
    """Judges the results of two runs of one case by the accuracy rule; returns the largest ratio to eager's error.

    Raises:
        Disagreement: a result is not accurate enough, of another shape or dtype, or differs between the runs.
    """
    truth, eager = expected
    worst = 0.0
    for name, value in first.items():
        if value.shape != truth[name].shape or value.dtype != eager[name].dtype:
            raise Disagreement(
                f"{name} is {value.dtype} {tuple(value.shape)}, not {eager[name].dtype} {tuple(truth[name].shape)}"
            )
        if not torch.equal(value, second[name]):
            raise Disagreement(f"{name} differs between two runs")
        error, allowed = relative_error(value, truth[name]), relative_error(eager[name], truth[name])
        # Where eager happens to be exact, a quarter of the dtype's rounding is still no disagreement.
        allowed = max(allowed, torch.finfo(value.dtype).eps / 4 / RATIO)
        if not error <= RATIO * allowed:
            raise Disagreement(f"{name} has error {error:.1e}, PyTorch's eager composition {allowed:.1e}")
        worst = max(worst, error / allowed)
    return worst


def _big_dtype(case: Case) -> torch.dtype:
    """That of x, which is the output's where adapters have another."""
    return next(case.tensors[name].dtype for name in ("x", "weight", *case.tensors) if name in case.tensors)


def _with_grads(y: Tensor, leaves: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    results = {"y": y.detach()}
    if case.grads:
        generator = torch.Generator(y.device).manual_seed(7)
        grad_y = torch.randn(y.shape, generator=generator, device=y.device, dtype=torch.float64)
        grad_y = grad_y.to(_big_dtype(case))
        wanted = [leaves[name] for name in case.grads]
        grads = torch.autograd.grad(y, wanted, grad_y.to(y.dtype))
        results |= {f"gradient of {name}": grad for name, grad in zip(case.grads, grads, strict=True)}
    return results


def run_op(case: Case, backend: str) -> dict[str, Tensor]:
    """The case's output "y" and its gradients by one implementation."""
    leaves = case.leaves()
    with dispatch.use_backend(backend):
        return _with_grads(case.call(leaves), leaves, case)


def _run_eager(case: Case, dtype: torch.dtype | None) -> dict[str, Tensor]:
    leaves = case.leaves(dtype)
    return _with_grads(case.eager(leaves), leaves, case)


def cases(op: str, device: str) -> Iterator[Case]:
    """The problems of an op's self-check on a device: few, small, of awkward sizes.

    Raises:
        KeyError: the op has none.
    """
    yield from CASES[op](Draw(device))


_SINGLE, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
# batch, N, K, r, dtype of x and W, dtype of A and B, dropout
_LAYERS = (
    Shape((3, 37), 80, 96, 5, _SINGLE, _SINGLE, 0.0),
    Shape((129,), 136, 200, 16, _SINGLE, _SINGLE, 0.25),
    Shape((65,), 264, 192, 24, _BF16, _SINGLE, 0.0),
    Shape((2, 70), 96, 128, 8, _BF16, _BF16, 0.1),
    Shape((96,), 64, 160, 3, _F16, _SINGLE, 0.0),
)
# Of few outputs the ratio of two errors, both no more than the rounding of the result, is a matter of luck.
_NORMS = (
    Shape((), 1031, 96, 5, _SINGLE, _SINGLE),
    Shape((), 1500, 200, 16, _BF16, _SINGLE),
    Shape((), 1200, 130, 24, _F16, _F16),
)
_TENSORS = (
    Shape((5,), 203, 203, 1, _SINGLE, _SINGLE, 0.3),
    Shape((64,), 96, 96, 1, _BF16, _BF16, 0.05),
    Shape((33,), 8, 8, 1, _F16, _F16, 0.5),
)


def _of_shapes(build: Callable[[Shape, Draw], Case], shapes: Iterable[Shape]) -> Callable[[Draw], Iterator[Case]]:
    return lambda draw: (build(shape, draw) for shape in shapes)


def _gated(build: Callable[..., Case], shapes: Iterable[Shape]) -> Callable[[Draw], Iterator[Case]]:
    """Every activation once."""
    return lambda draw: (build(*pair) for pair in zip(shapes, repeat(draw), problems.ACTIVATIONS, strict=False))


def _splitk_reduce_cases(draw: Draw) -> Iterator[Case]:
    for parts, size, dtype in ((7, 1001, _SINGLE), (16, 512, _BF16), (1, 33, _SINGLE)):
        yield problems.splitk_reduce(parts, size, dtype, draw)


# Each adapter has some of the rows: of few, or of a small rank, the ratio of two errors is a matter of luck.
_MULTI = (
    Shape((3, 67), 80, 96, 24, _SINGLE, _SINGLE, 0.0),
    Shape((259,), 136, 200, 40, _SINGLE, _SINGLE, 0.25),
    Shape((165,), 264, 192, 36, _BF16, _SINGLE, 0.0),
    Shape((2, 70), 96, 128, 48, _BF16, _BF16, 0.1),
    Shape((196,), 64, 160, 28, _F16, _SINGLE, 0.0),
)
_FEW_ROWS = Shape((9,), 515, 264, 8, _BF16, _SINGLE)


def _multi_lora_linear_cases(draw: Draw) -> Iterator[Case]:
    """Of few rows too, which have kernels of their own, and of two weighted adapters a row."""
    for shape in _MULTI:
        yield problems.multi_lora_linear(shape, draw)
    for shape in _MULTI[2:4]:  # in float32 the order of sums alone decides
        yield problems.multi_lora_linear(shape, draw, per_row=2)
    yield replace(problems.multi_lora_linear(_FEW_ROWS, draw), grads=())


def _multi_lora_expert_linear_cases(draw: Draw) -> Iterator[Case]:
    """With rows for each expert and adapter, as above."""
    for shape in (_MULTI[0], _MULTI[3]):
        yield problems.multi_lora_expert_linear(replace(shape, batch=(3 * math.prod(shape.batch),)), draw)


# With the arguments of `problems.nf4_weight`: a row's end is seldom a block's. Few rows have kernels of their own.
_QUANTISED: tuple[tuple[Shape, dict[str, Any]], ...] = (
    (_LAYERS[0], {"nested": False}),
    (_LAYERS[1], {"blocksize": 4096}),
    (_LAYERS[2], {}),
    (_LAYERS[3], {"blocksize": 32, "nested": False}),
    (_LAYERS[4], {"blocksize": 256}),
    (Shape((16,), 131, 515, 4, _BF16, _SINGLE), {}),
    (Shape((1,), 2051, 1024, 8, _BF16, _BF16), {"nested": False}),
)


def _quantised(build: Callable[..., Case]) -> Callable[[Draw], Iterator[Case]]:
    return lambda draw: (build(shape, draw, **weight) for shape, weight in _QUANTISED)


def _nf4_quantize_cases(draw: Draw) -> Iterator[Case]:
    for shape, weight in _QUANTISED:
        yield problems.nf4_quantize(shape, draw, weight.get("blocksize", 64))


_DENSITIES = (0.5, 0.02, 0.9, 0.3, 1.0)


def _masked_linear_cases(draw: Draw) -> Iterator[Case]:
    for shape, density in zip(_LAYERS, _DENSITIES, strict=True):
        yield problems.masked_linear(shape, draw, density)
    yield problems.masked_linear(_LAYERS[2], draw, weight_is_masked=True)


def _masked_lora_linear_cases(draw: Draw) -> Iterator[Case]:
    """The update inside the mask, and beside it."""
    for shape, density in zip(_LAYERS, _DENSITIES, strict=True):
        yield problems.masked_lora_linear(shape, draw, density)
    for shape in _LAYERS[1:3]:
        yield problems.masked_lora_linear(shape, draw, update_masked=False)


def _sparse_linear_cases(draw: Draw) -> Iterator[Case]:
    """Every layout, and of the two for few rows those, which have kernels of their own. Of few columns the ratio of
    two errors, both no more than the rounding of the result, is a matter of luck."""
    for shape, layout in zip(_LAYERS, ("block", "block", "bitmap", "2:4", "block"), strict=True):
        yield problems.sparse_linear(replace(shape, k=4 * shape.k + 36), draw, layout)
    for shape in (_LAYERS[0], Shape((5,), 515, 264, 1, _BF16), Shape((1,), 2051, 200, 1, _F16)):
        yield problems.sparse_linear(shape, draw, "bitmap", 0.5)
        yield problems.sparse_linear(shape, draw, "csr", 0.1)


CASES: dict[str, Callable[[Draw], Iterator[Case]]] = {
    "lora_linear": _of_shapes(problems.lora_linear, _LAYERS),
    "lora_linear_group": _of_shapes(problems.lora_linear_group, _LAYERS),
    "dora_linear": _of_shapes(problems.dora_linear, _LAYERS),
    "dora_weight_norm": _of_shapes(problems.dora_weight_norm, _NORMS),
    "lora_swiglu_mlp": _gated(problems.lora_swiglu_mlp, _LAYERS),
    "gated_activation": _gated(problems.gated_activation, _TENSORS),
    "lora_embedding": _of_shapes(problems.lora_embedding, _LAYERS),
    "lora_expert_linear": _of_shapes(problems.lora_expert_linear, _LAYERS),
    "multi_lora_linear": _multi_lora_linear_cases,
    "multi_lora_expert_linear": _multi_lora_expert_linear_cases,
    "nf4_linear": _quantised(problems.nf4_linear),
    "nf4_lora_linear": _quantised(problems.nf4_lora_linear),
    "nf4_dequantize": _quantised(problems.nf4_dequantize),
    "nf4_quantize": _nf4_quantize_cases,
    "mask_pack": _of_shapes(problems.mask_pack, _LAYERS),
    "mask_unpack": _of_shapes(problems.mask_unpack, _LAYERS),
    "mask_apply": _of_shapes(problems.mask_apply, _LAYERS),
    "masked_linear": _masked_linear_cases,
    "masked_lora_linear": _masked_lora_linear_cases,
    "sparse_linear": _sparse_linear_cases,
    "sparse_delta_linear": _of_shapes(problems.sparse_delta_linear, _LAYERS),
    "multi_mask_linear": _of_shapes(problems.multi_mask_linear, _MULTI),
    "philox_dropout": _of_shapes(problems.philox_dropout, _TENSORS),
    "splitk_reduce": _splitk_reduce_cases,
}
