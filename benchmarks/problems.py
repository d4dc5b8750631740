"""The problems that are measured, and the least work that each can be done with."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from peft_kernels import problems
from peft_kernels.problems import BUILDERS, Case, Draw, Shape
from peft_kernels.tuning.points import FORWARD, FORWARD_BACKWARD, MODES
from tests.helpers import LoraProblem

__all__ = [
    "FORWARD", "FORWARD_BACKWARD", "MODES", "SCALING", "Case", "Ceilings", "Spec", "Tensors", "block_specs",
    "cpu_specs", "gpu_specs", "nf4_specs", "specs", "sweep_specs",
]  # fmt: skip

SCALING = 2.0
SHORT_NAMES = {
    "dora_linear": "dora", "lora_linear_group": "qkv", "lora_swiglu_mlp": "mlp", "nf4_linear": "nf4",
    "nf4_lora_linear": "qlora",
}  # fmt: skip
QUANTISED = {"nf4_linear": problems.nf4_linear, "nf4_lora_linear": problems.nf4_lora_linear}
# A half, a byte for each block of 64, and 4 bytes for each 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


class Ceilings(NamedTuple):
    """What the device reaches: matmul rate [FLOP/s] in one dtype and memory bandwidth [B/s], read plus written."""

    flop_per_s: float
    bytes_per_s: float


@dataclass
class Tensors(LoraProblem):
    """`LoraProblem` drawn on the device itself (drawing 10^8 numbers on the host takes seconds), W and b frozen, with
    the dropout mask of whichever peer is being checked."""

    drop_mask: Tensor | None = None

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def draw(*shape: int, std: float = 1.0, dtype: torch.dtype = self.dtype) -> Tensor:
            values = torch.randn(*shape, generator=generator, device=self.device, dtype=torch.float32)
            return values.mul_(std).to(dtype)

        adapter_dtype = self.adapter_dtype or self.dtype
        self.tensors = {
            "x": draw(self.m, self.k).requires_grad_(),
            "weight": draw(self.n, self.k, std=self.k**-0.5),
            "bias": draw(self.n) if self.bias else None,
            "lora_A": draw(self.r, self.k, std=self.k**-0.5, dtype=adapter_dtype).requires_grad_(),
            "lora_B": draw(self.n, self.r, std=self.r**-0.5, dtype=adapter_dtype).requires_grad_(),
        }
        self.grad_y = draw(self.m, self.n)

    def mask(self) -> Tensor:
        if self.drop_mask is None:
            return torch.ones_like(self.tensors["x"], dtype=torch.float64).detach()
        return self.drop_mask


@dataclass(frozen=True)
class Spec:
    """One problem: M tokens, K in_features, N out_features, rank, dtypes, dropout probability and CPU threads.

    Of `lora_linear_group` N is the width of q, k and v are N/4 wide; of `lora_swiglu_mlp` it is the width inside.
    """

    m: int
    k: int
    n: int
    r: int
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype = torch.float32
    dropout_p: float = 0.0
    device: str = "cpu"
    threads: int | None = None
    op: str = "lora_linear"
    # Sets of tensors that a measurement on a GPU goes through at most.
    most_sets: ClassVar[int] = 64

    @property
    def label(self) -> str:
        dtypes = f"{DTYPE_NAMES[self.dtype]}-{DTYPE_NAMES[self.adapter_dtype]}"
        name = f"M{self.m}-K{self.k}-N{self.n}-r{self.r}-{dtypes}-p{self.dropout_p:g}"
        return name if self.op == "lora_linear" else f"{SHORT_NAMES[self.op]}-{name}"

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """(in_features, out_features) of each linear layer."""
        if self.op == "lora_linear_group":
            return ((self.k, self.n), (self.k, self.n // 4), (self.k, self.n // 4))
        if self.op == "lora_swiglu_mlp":
            return ((self.k, self.n), (self.k, self.n), (self.n, self.k))
        return ((self.k, self.n),)

    def draw(self, seed: int = 1, *, zero_B: bool = False) -> Tensors:
        """Tensors of this problem of `lora_linear`; `zero_B` makes it the frozen layer's."""
        problem = Tensors(
            m=self.m, k=self.k, n=self.n, r=self.r, dtype=self.dtype, adapter_dtype=self.adapter_dtype, bias=False,
            scaling=SCALING, dropout_p=self.dropout_p, seed=seed, device=self.device,
        )  # fmt: skip
        if zero_B:
            problem.tensors["lora_B"].detach().zero_()
        return problem

    def case(self, seed: int = 1, *, device: str | None = None) -> Case:
        """The problem of any op, without biases."""
        shape = Shape((self.m,), self.n, self.k, self.r, self.dtype, self.adapter_dtype, self.dropout_p)
        build = QUANTISED.get(self.op) or BUILDERS[self.op]
        return build(shape, Draw(device or self.device, seed)).without("bias")

    def dispatched(self) -> Any:
        """What dispatch chooses by."""
        index = torch.cuda.current_device() if self.device == "cuda" else None
        return self.case(device="meta").problem._replace(device=self.device, device_index=index)

    def without_dropout(self) -> Spec:
        return replace(self, dropout_p=0.0)

    def flop(self, mode: str) -> int:
        """Floating-point operations that any implementation needs (dW is not wanted), element-wise ones left out."""
        base = sum(2 * self.m * k * n for k, n in self.layers)
        down = sum(2 * self.m * self.r * k for k, _ in self.layers)
        up = sum(2 * self.m * self.r * n for _, n in self.layers)
        forward = base + down + up
        # dx = dY W + dS A; dS = dY B; dA = dSᵀ x; dB = dYᵀ S.
        return forward if mode == FORWARD else forward + base + 2 * down + 2 * up

    def bytes(self, mode: str) -> int:
        """Bytes that must move, each tensor read or written once a direction; S stays in cache."""
        size, adapter_size = self.dtype.itemsize, self.adapter_dtype.itemsize
        adapters = sum(self.r * (k + n) * adapter_size for k, n in self.layers)
        weight_size = NF4_BYTES if self.op in QUANTISED else size
        weights = sum(round(k * n * weight_size) for k, n in self.layers)
        x, outputs = self.m * self.k * size, sum(self.m * n * size for _, n in self.layers)
        forward = x + weights + outputs + adapters
        # Backward reads every dY or, inside an MLP, gate and up; W, x, A, B; it writes dx, dA, dB.
        return forward if mode == FORWARD else forward + outputs + weights + 2 * x + 2 * adapters

    def floor(self, mode: str, ceilings: Ceilings) -> float:
        """Seconds below which no implementation gets: max(FLOP / rate, bytes / bandwidth)."""
        return max(self.flop(mode) / ceilings.flop_per_s, self.bytes(mode) / ceilings.bytes_per_s)


def cpu_specs() -> list[Spec]:
    """Host time of a call (tiny), MiniLM's attention and feed-forward layers, and a middle-sized layer."""
    return [
        Spec(4, 16, 16, 4, threads=1),
        Spec(1024, 384, 384, 16, threads=2),
        Spec(1024, 384, 1536, 16, threads=2),
        Spec(512, 1024, 1024, 16, threads=2),
        Spec(512, 1024, 1024, 16, dropout_p=0.05, threads=2),
    ]


def gpu_specs() -> list[Spec]:
    """The main shape in every variant, then other shapes of Llama-3-8B and decode in the two most used variants."""
    bf16, fp32 = torch.bfloat16, torch.float32
    main = [
        Spec(8192, 4096, 4096, r, bf16, adapter, p, "cuda")
        for r in (16, 64)
        for adapter in (bf16, fp32)
        for p in (0.0, 0.05)
    ]
    shapes = (
        (4096, 4096, 14336),
        (4096, 14336, 4096),
        (512, 4096, 4096),
        (2048, 4096, 4096),
        (8192, 4096, 1024),
        (1, 4096, 4096),
        (16, 4096, 4096),
    )
    others = [
        Spec(m, k, n, 16, bf16, adapter, p, "cuda")
        for m, k, n in shapes
        for adapter, p in ((bf16, 0.0), (fp32, 0.05))
        if not (m <= 16 and p)
    ]
    return main + others


def block_specs(op: str) -> list[Spec]:
    """Problems of `dora_linear`, `lora_linear_group` and `lora_swiglu_mlp` that this machine can measure."""
    bf16, fp32 = torch.bfloat16, torch.float32
    inside = {"lora_swiglu_mlp": (2752, 14336)}.get(op, (1024, 4096))
    if torch.cuda.is_available():
        variants = ((bf16, 0.0), (fp32, 0.0), (fp32, 0.05))
        return [Spec(8192, 4096, inside[1], 16, bf16, adapter, p, "cuda", op=op) for adapter, p in variants]
    return [Spec(512, 1024, inside[0], 16, dropout_p=p, threads=2, op=op) for p in (0.0, 0.05)]


def nf4_specs(op: str, mode: str) -> list[Spec]:
    """Problems of `nf4_linear` and `nf4_lora_linear`, double quantisation, blocks of 64: decode and prefill of
    Llama-3-8B's layers, and the rows of training."""
    bf16, r = torch.bfloat16, 16 if op == "nf4_lora_linear" else 0
    if torch.cuda.is_available():
        rows = (1, 16, 64, 128, 512, 8192) if mode == FORWARD else (16, 512, 8192)
        return [Spec(m, 4096, n, r, bf16, bf16, 0.0, "cuda", op=op) for n in (4096, 14336) for m in rows]
    rows = (1, 16, 256) if mode == FORWARD else (16, 256)
    return [Spec(m, 4096, 4096, r, bf16, bf16, threads=2, op=op) for m in rows]


ROWS = (1, 4, 16, 64, 256, 512, 1024, 4096)
RANKS = (4, 8, 16, 32, 64)


def sweep_specs() -> list[Spec]:
    """`lora_linear` over M at r = 16, and over r at M = 512 (GPU: 8192), for the charts of the overhead."""
    if torch.cuda.is_available():
        make = functools.partial(Spec, dtype=torch.bfloat16, adapter_dtype=torch.bfloat16, device="cuda")
        rows, ranks, width, m = (*ROWS, 8192, 16384), (*RANKS, 128, 256), 4096, 8192
    else:
        make, rows, ranks, width, m = functools.partial(Spec, threads=2), ROWS, RANKS, 1024, 512
    return [make(rows_, width, width, 16) for rows_ in rows] + [make(m, width, width, r) for r in ranks if r != 16]


def specs() -> list[Spec]:
    """What this machine can measure."""
    return gpu_specs() if torch.cuda.is_available() else cpu_specs()
