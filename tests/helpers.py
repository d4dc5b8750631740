"""What tests of several ops share: problems, the float64 oracle and the accuracy rule."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import peft_kernels
from peft_kernels import functional

GRADS = ("x", "weight", "bias", "lora_A", "lora_B")
RATIO = 1.2


def relative_error(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth|| in float64 (Frobenius). NaN in `value` gives NaN, which passes no comparison."""
    value, truth = value.double().to(truth.device), truth.double()
    norm = truth.norm()
    return float((value - truth).norm() / norm) if norm > 0 else float((value - truth).norm())


@dataclass
class LoraProblem:
    """Seeded tensors of one `lora_linear` problem, leaves that require gradients."""

    m: tuple[int, ...] | int = 33
    k: int = 48
    n: int = 40
    r: int = 5
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    bias: bool = True
    scaling: float = 1.5
    dropout_p: float = 0.0
    seed: int = 1234
    device: str = "cpu"
    tensors: dict[str, Tensor] = field(init=False, repr=False)
    grad_y: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        batch = (self.m,) if isinstance(self.m, int) else tuple(self.m)
        adapter_dtype = self.adapter_dtype or self.dtype
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = self.dtype) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
            return values.to(dtype).to(self.device).requires_grad_()

        self.tensors = {
            "x": draw(*batch, self.k),
            "weight": draw(self.n, self.k, scale=max(1, self.k) ** -0.5),
            "bias": draw(self.n) if self.bias else None,
            "lora_A": draw(self.r, self.k, scale=max(1, self.k) ** -0.5, dtype=adapter_dtype),
            "lora_B": draw(self.n, self.r, scale=self.r**-0.5, dtype=adapter_dtype),
        }
        self.grad_y = draw(*batch, self.n).detach()

    def run(self, **changes) -> tuple[Tensor, dict[str, Tensor]]:
        """The library's output and gradients, by whatever backend is in force."""
        t = {**self.tensors, **changes}
        y = functional.lora_linear(
            t["x"], t["weight"], t["lora_A"], t["lora_B"], bias=t["bias"],
            scaling=self.scaling, dropout_p=self.dropout_p, seed=self.seed if self.dropout_p else None,
        )  # fmt: skip
        return y.detach(), self._gradients(y, t)

    def _gradients(self, y: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        wanted = {name: t for name, t in tensors.items() if t is not None and t.requires_grad}
        grads = torch.autograd.grad(y, list(wanted.values()), self.grad_y.to(y.dtype))
        return dict(zip(wanted, grads, strict=True))

    def mask(self) -> Tensor:
        """drop(1): 0 or 1 / (1 - p) for each element of x."""
        ones = torch.ones_like(self.tensors["x"], dtype=torch.float64).detach()
        with peft_kernels.use_backend("reference"):
            return functional.philox_dropout(ones, self.dropout_p, self.seed) if self.dropout_p else ones

    def absolute(self) -> LoraProblem:
        """The same problem with every number replaced by its absolute value: the size of the terms that are summed."""
        twin = replace(self, scaling=abs(self.scaling))
        twin.tensors = {n: None if v is None else v.detach().abs().requires_grad_() for n, v in self.tensors.items()}
        twin.grad_y = self.grad_y.abs()
        return twin

    def eager(self, dtype: torch.dtype | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """PyTorch's own composition, differentiated by autograd, at the problem's dtypes or all in `dtype`."""
        t = {
            name: None if v is None else v.detach().to(dtype or v.dtype).requires_grad_()
            for name, v in self.tensors.items()
        }
        x = t["x"]
        dropped = x * self.mask().to(x.dtype) if self.dropout_p else x
        low_rank = F.linear(F.linear(dropped, t["lora_A"].to(x.dtype)), t["lora_B"].to(x.dtype))
        y = F.linear(x, t["weight"], t["bias"]) + self.scaling * low_rank
        return y.detach(), self._gradients(y, t)


def assert_as_accurate_as_eager(problem: LoraProblem, result, ratio: float = RATIO) -> None:
    """The accuracy rule: error against float64 at most `ratio` times that of PyTorch's eager composition, for the
    output and every gradient. A quarter of the dtype's eps is allowed where eager happens to be exact."""
    y, grads = result
    true_y, true_grads = problem.eager(torch.float64)
    eager_y, eager_grads = problem.eager()
    rows = {"y": (y, true_y, eager_y)}
    rows.update({name: (grads[name], true_grads[name], eager_grads[name]) for name in grads})
    for name, (value, truth, eager) in rows.items():
        assert value.dtype == eager.dtype, f"{name}: dtype {value.dtype}, eager has {eager.dtype}"
        assert value.shape == eager.shape, f"{name}: shape {tuple(value.shape)}, eager has {tuple(eager.shape)}"
        error, allowed = relative_error(value, truth), relative_error(eager, truth)
        floor = torch.finfo(value.dtype).eps / 4
        assert error <= max(ratio * allowed, floor), f"{name}: error {error:.3e}, eager has {allowed:.3e}"


def assert_within_rounding(problem: LoraProblem, result) -> None:
    """Each single element of the output and of the gradients is within the rounding error that any sound order of the
    sums may have: |value - truth| <= (8 u + 4 sqrt(L) u32) T, where T is the same composition of absolute values, L the
    length of the sums, u and u32 the unit roundings of the dtype and of float32 accumulation (Higham and Mary, "A new
    approach to probabilistic rounding error analysis", 2019). Unlike a ratio to eager, this is sharp for tiny problems.
    """
    truth, terms = _named(problem.eager(torch.float64)), _named(problem.absolute().eager(torch.float64))
    rows = problem.tensors["x"].numel() // max(1, problem.k)
    length = problem.k + problem.n + problem.r + rows
    for name, value in _named(result).items():
        assert value.shape == truth[name].shape, f"{name}: shape {tuple(value.shape)}, not {tuple(truth[name].shape)}"
        dtype, wide = torch.finfo(problem.dtype), torch.finfo(torch.promote_types(problem.dtype, torch.float32))
        unit = max(dtype.eps, torch.finfo(value.dtype).eps) / 2
        bound = (8 * unit + 4 * length**0.5 * wide.eps / 2) * terms[name] + 8 * length * unit * dtype.tiny  # underflow
        excess = ((value.double() - truth[name]).abs() - bound).cpu()
        assert not excess.isnan().any(), f"{name}: NaN"
        assert excess.numel() == 0 or excess.max() <= 0, (
            f"{name}: an element is {float(excess.max()):.3e} past its bound"
        )


def _named(result) -> dict[str, Tensor]:
    y, grads = result
    return {"y": y, **grads}
