"""Checks every implementation of every op on this machine, in seconds: `doctor`, `tune` and the benchmarks use it.

The accuracy rule: the relative Frobenius error against float64, of the output and of every gradient, is at most 1.2
times the error of PyTorch's own eager composition at the same dtypes. The composition and its float64 truth are
differentiated by autograd and share no code with any implementation but the dropout mask's specification. Results must
also be the same bits when computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels import dispatch, functional, ops
from peft_kernels.kernels.reference import philox_dropout as philox_reference

RATIO = 1.2


@dataclass(frozen=True)
class Case:
    """One problem of an op: tensors by argument name (those in `grads` get gradients), other arguments, and eager code.

    `eager(tensors)` composes the op of PyTorch's own functions in the dtype of whatever tensors it is given. Tensors of
    an argument that is a list are named "weights.0", "weights.1" ...; several outputs count as one, side by side.
    """

    op: str
    label: str
    tensors: dict[str, Tensor]
    options: Mapping[str, object]
    eager: Callable[[dict[str, Tensor]], Tensor] = field(repr=False)
    grads: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        return next(iter(self.tensors.values())).device.type

    def call(self, tensors: dict[str, Tensor]) -> Tensor:
        """The op's output for these tensors, by whatever implementation is in force."""
        y = getattr(functional, self.op)(**_nested(tensors), **self.options)
        return y if isinstance(y, Tensor) else torch.cat(tuple(y), -1)


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


def check_implementation(op: str, backend: str, problems: list[Case]) -> Outcome:
    """Runs one implementation on the cases that it supports."""
    device = problems[0].device
    checked, worst, refusals = 0, 0.0, []
    for case in problems:
        refusal = dispatch.objection(op, backend, _problem(case), forced=True)
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
    objection = dispatch.objection(op, backend, _problem(problems[0]))
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


def _leaves(case: Case, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    floats = {name: t.detach().to(dtype or t.dtype) for name, t in case.tensors.items() if t.is_floating_point()}
    return {name: floats[name].requires_grad_(name in case.grads) for name in floats}


def _with_grads(y: Tensor, leaves: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    results = {"y": y.detach()}
    if case.grads:
        generator = torch.Generator(y.device).manual_seed(7)
        grad_y = torch.randn(y.shape, generator=generator, device=y.device, dtype=torch.float64)
        grad_y = grad_y.to(case.tensors["x"].dtype)
        wanted = [leaves[name] for name in case.grads]
        grads = torch.autograd.grad(y, wanted, grad_y.to(y.dtype))
        results |= {f"gradient of {name}": grad for name, grad in zip(case.grads, grads, strict=True)}
    return results


def run_op(case: Case, backend: str) -> dict[str, Tensor]:
    """The case's output "y" and its gradients by one implementation."""
    leaves = _leaves(case)
    with dispatch.use_backend(backend):
        return _with_grads(case.call(leaves), leaves, case)


def _run_eager(case: Case, dtype: torch.dtype | None) -> dict[str, Tensor]:
    leaves = _leaves(case, dtype)
    return _with_grads(case.eager(leaves), leaves, case)


def _nested(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors named "weights.0", "weights.1" as one argument, the list `weights`."""
    arguments: dict[str, Any] = {}
    for name, tensor in tensors.items():
        stem, _, index = name.partition(".")
        if index:
            arguments.setdefault(stem, []).append(tensor)
        else:
            arguments[stem] = tensor
    return arguments


def _problem(case: Case):
    return getattr(ops, case.op).problem(**_nested(case.tensors), **case.options)


def cases(op: str, device: str) -> Iterator[Case]:
    """The problems of an op's self-check on a device: few, small, of awkward sizes.

    Raises:
        KeyError: the op has none.
    """
    return CASES[op](device)


def _draw(device: str, dtype: torch.dtype, *shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)


def _dropped(x: Tensor, p: float, seed: int) -> Tensor:
    rows = x.numel() // x.shape[-1]
    mask = philox_reference.keep_mask(rows, x.shape[-1], p, torch.tensor([seed], device=x.device))
    return x * (mask.view_as(x) * (1 / (1 - p))).to(x.dtype)


def _lora_linear_cases(device: str) -> Iterator[Case]:
    single, half = torch.float32, torch.bfloat16
    # batch, K, N, r, dtype of x and W, dtype of A and B, dropout
    rows = [
        ((3, 37), 96, 80, 5, single, single, 0.0),
        ((129,), 200, 136, 16, single, single, 0.25),
        ((65,), 192, 264, 24, half, single, 0.0),
        ((2, 70), 128, 96, 8, half, half, 0.1),
        ((96,), 160, 64, 3, torch.float16, single, 0.0),
    ]
    for batch, k, n, r, dtype, adapter_dtype, p in rows:
        tensors = {
            "x": _draw(device, dtype, *batch, k, seed=1),
            "weight": _draw(device, dtype, n, k, seed=2, scale=k**-0.5),
            "bias": _draw(device, dtype, n, seed=3),
            "lora_A": _draw(device, adapter_dtype, r, k, seed=4, scale=k**-0.5),
            "lora_B": _draw(device, adapter_dtype, n, r, seed=5, scale=r**-0.5),
        }

        def eager(t: dict[str, Tensor], p: float = p) -> Tensor:
            x = t["x"]
            dropped = _dropped(x, p, seed=11) if p else x
            low_rank = F.linear(F.linear(dropped, t["lora_A"].to(x.dtype)), t["lora_B"].to(x.dtype))
            return F.linear(x, t["weight"], t["bias"]) + 1.5 * low_rank

        label = f"{'x'.join(map(str, batch))}, {k} -> {n}, r={r}, {_short(dtype)}/{_short(adapter_dtype)}, p={p}"
        options = {"scaling": 1.5, "dropout_p": p, "seed": 11}
        yield Case("lora_linear", label, tensors, options, eager, grads=("x", "lora_A", "lora_B"))


def _philox_dropout_cases(device: str) -> Iterator[Case]:
    for shape, dtype, p in (
        ((5, 203), torch.float32, 0.3),
        ((64, 96), torch.bfloat16, 0.05),
        ((33, 8), torch.float16, 0.5),
    ):
        tensors = {"x": _draw(device, dtype, *shape, seed=1)}

        def eager(t: dict[str, Tensor], p: float = p) -> Tensor:
            return _dropped(t["x"], p, seed=-5)

        label = f"{'x'.join(map(str, shape))}, {_short(dtype)}, p={p}"
        yield Case("philox_dropout", label, tensors, {"p": p, "seed": -5}, eager, grads=("x",))


def _splitk_reduce_cases(device: str) -> Iterator[Case]:
    for parts, size, dtype in ((7, 1001, torch.float32), (16, 512, torch.bfloat16), (1, 33, torch.float32)):
        tensors = {"partials": _draw(device, torch.float32, parts, size, seed=1)}

        def eager(t: dict[str, Tensor], dtype: torch.dtype = dtype) -> Tensor:
            partials = t["partials"]
            total = reduce(add, partials.unbind()) * 0.5
            return total if partials.dtype == torch.float64 else total.to(dtype)

        options = {"scale": 0.5, "dtype": dtype}
        yield Case("splitk_reduce", f"{parts} parts of {size} to {_short(dtype)}", tensors, options, eager)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CASES: dict[str, Callable[[str], Iterator[Case]]] = {
    "lora_linear": _lora_linear_cases,
    "philox_dropout": _philox_dropout_cases,
    "splitk_reduce": _splitk_reduce_cases,
}
