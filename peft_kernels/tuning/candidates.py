"""Which configurations `peft-kernels tune` tries for a kernel.

Around the configuration in force: values of `SPACES` one step away in one field ("small"), or any of them in up to two
fields ("full"). Besides, every configuration that a rule of this or an older architecture gives to the kernel, and none
at all for kernels that an op can do without. A kernel without a space is tried with the rules' configurations. "none"
is the configuration in force alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from peft_kernels.tuning.configs import Config
from peft_kernels.tuning.files import known_architectures, load, number
from peft_kernels.tuning.points import NONE, SMALL
from peft_kernels.tuning.trials import Answer

# Accumulators a thread can hold beside what a main loop needs; more always spills.
MOST_ACCUMULATORS = 128
THREADS_PER_WARP = 32


@dataclass(frozen=True)
class Space:
    """Values to try of a configuration's fields, and what bounds their combinations.

    Attributes:
        fields: (field, values in order).
        per_multiprocessor: fields whose values are multiples of the GPU's number of multiprocessors.
        staged: tiles, each two fields, of which `num_stages` copies are in shared memory.
        accumulated: the tile, two fields, that is summed in registers, or None.
        optional: the op can do without this kernel.
        most_accumulators: of a thread; half as many where there are two tiles of them.
    """

    fields: tuple[tuple[str, tuple[int, ...]], ...]
    per_multiprocessor: tuple[str, ...] = ()
    staged: tuple[tuple[str, str], ...] = ()
    accumulated: tuple[str, str] | None = None
    optional: bool = False
    most_accumulators: int = MOST_ACCUMULATORS


@dataclass(frozen=True)
class Machine:
    """What bounds a candidate: architecture, multiprocessors, bytes of shared memory that one program can have."""

    arch: str
    multiprocessors: int
    shared_bytes: int


_WARPS, _STAGES, _PROGRAMS = ("num_warps", (4, 8)), ("num_stages", (2, 3, 4, 5)), ("programs", (1, 2, 4))


def _gemm(*more: tuple[str, tuple[int, ...]], optional: bool = True) -> Space:
    tiles = (
        ("block_m", (16, 32, 64, 128, 256)), ("block_n", (64, 128, 256)), ("block_k", (32, 64, 128)),
        ("group_m", (4, 8, 16)),
    )  # fmt: skip
    staged = (("block_m", "block_k"), ("block_k", "block_n"))
    return Space((*tiles, _WARPS, _STAGES, *more), (), staged, ("block_m", "block_n"), optional)


_ROWS, _WIDE = ("block_m", (16, 32, 64, 128)), ("block_k", (32, 64, 128, 256))
_DOWN = Space(
    (_ROWS, _WIDE, _WARPS, _STAGES, _PROGRAMS, ("splits", (1, 64))),
    ("programs",),
    (("block_m", "block_k"), ("block_k", "block_r")),
)
_SUMS = Space(
    (("block_m", (32, 64, 128)), _WIDE, _WARPS, _STAGES, _PROGRAMS),
    ("programs",),
    (("block_m", "block_k"), ("block_m", "block_r")),
)
_GRAD_S_B = Space(
    (("block_m", (64, 128, 256)), ("block_n", (32, 64, 128)), _WARPS, _STAGES, _PROGRAMS),
    ("programs",),
    (("block_m", "block_n"),),
    optional=True,
)
_SINGLE_PASS = Space(
    (("block_n", (32, 64, 128)), ("block_k", (64, 128)), _WARPS, _STAGES, _PROGRAMS),
    ("programs",),
    (("block_n", "block_k"), ("block_r", "block_k")),
    optional=True,
)
_NF4_GEMM = Space(
    (
        ("block_m", (16, 32, 64, 128)), ("block_n", (64, 128, 256)), ("block_k", (64, 128, 256)),
        ("group_m", (4, 8, 16)), _WARPS, _STAGES, _PROGRAMS,
    ),
    ("programs",),
    (("block_m", "block_k"),),
    ("block_m", "block_n"),
)  # fmt: skip
_NF4_GRAD_X = replace(_NF4_GEMM, staged=(("block_m", "block_n"),), accumulated=("block_m", "block_k"))
_MULTI_DECODE = Space(
    (("block_n", (128, 256, 512)), ("block_k", (128, 256, 512)), _WARPS, ("num_stages", (2, 4, 6, 8))),
)  # fmt: skip
_BLOCK_GEMM = Space(
    (("block_m", (16, 32, 64, 128)), ("block_k", (32, 64, 128)), _WARPS, _STAGES),
    staged=(("block_m", "block_k"),),
)
_BLOCK_GRAD_VALUES = Space((("block_m", (16, 32, 64, 128)), _WARPS, _STAGES, _PROGRAMS), ("programs",))
_MASKED_GEMM = replace(_NF4_GEMM, staged=(("block_m", "block_k"), ("block_n", "block_k")))
_MASKED_GRAD_WEIGHT = Space(
    (
        ("block_m", (32, 64)),
        ("block_n", (64, 128)),
        ("block_k", (64, 128, 256)),
        ("group_m", (4, 8, 16)),
        _WARPS,
        _STAGES,
    ),
    (),
    (("block_m", "block_n"), ("block_m", "block_k")),
    ("block_n", "block_k"),
)
# Masks share W through L2: the more of their tiles stand one after another, the less of it is read.
_MULTI_MASK_GEMM = replace(
    _MASKED_GEMM,
    fields=tuple((name, (4, 8, 16, 64) if name == "group_m" else values) for name, values in _MASKED_GEMM.fields),
)
SPACES: dict[str, Space] = {
    "philox_dropout": Space((("block", (1024, 2048, 4096)), ("block_k", (256, 512, 1024)), _WARPS)),
    "gated_activation": Space((("block", (1024, 2048, 4096)), ("block_n", (256, 512, 1024)), _WARPS)),
    "splitk_reduce": Space((("block", (256, 512, 1024)), ("unroll", (4, 8, 16)), _WARPS)),
    "grad_scale": Space(
        (("block_m", (16, 32, 64, 128)), ("block_n", (32, 64, 128, 256)), _WARPS, _PROGRAMS), ("programs",)
    ),
    "dora_weight_norm": Space(
        (("block_n", (16, 32, 64, 128)), _WIDE, _WARPS, _STAGES),
        staged=(("block_n", "block_k"), ("block_k", "block_r")),
    ),
    "down_projection": _DOWN,
    "expert_down_projection": _DOWN,
    "group_down_projection": _SUMS,
    "extended_gemm": _gemm(optional=False),
    "extended_gemm_tma": _gemm(),
    "extended_gemm_persistent": _gemm(("parts", (1, 2, 4))),
    "expert_gemm": _gemm(optional=False),
    "expert_gemm_tma": _gemm(),
    "product": _gemm(optional=False),
    "product_tma": _gemm(),
    "single_pass": _SINGLE_PASS,
    "grad_s_b": _GRAD_S_B,
    "group_grad_s_b": _GRAD_S_B,
    "sum_over_rows": _SUMS,
    "group_sum_over_rows": _SUMS,
    "expert_sum_over_rows": _SUMS,
    "multi_down_projection": _DOWN,
    "multi_gemm": _gemm(),
    "multi_update": Space(
        (_ROWS, ("block_n", (64, 128, 256)), ("group_m", (4, 8, 16)), _WARPS), accumulated=("block_m", "block_n")
    ),
    "multi_sum_over_rows": _SUMS,
    "nf4_dequantize": Space((("block", (2048, 4096, 8192)), _WARPS)),
    "nf4_gemm": _NF4_GEMM,
    "nf4_gemm_any": _NF4_GEMM,
    "nf4_grad_x": _NF4_GRAD_X,
    "nf4_grad_x_any": _NF4_GRAD_X,
    "multi_decode": _MULTI_DECODE,
    "mask_passes": Space((("block", (2048, 4096, 8192)), ("block_k", (128, 256, 512)), _WARPS)),
    "masked_gemm": _MASKED_GEMM,
    "masked_gemm_tma": replace(_MASKED_GEMM, optional=True),
    "masked_grad_x": _MASKED_GEMM,
    "masked_grad_x_tma": replace(_MASKED_GEMM, optional=True),
    "masked_grad_weight": _MASKED_GRAD_WEIGHT,
    "masked_grad_factors": replace(_MASKED_GRAD_WEIGHT, most_accumulators=64),
    "masked_update_gemm": _MASKED_GEMM,
    "masked_update_grad_x": _MASKED_GEMM,
    "multi_mask_gemm": _MULTI_MASK_GEMM,
    "multi_mask_grad_x": _MULTI_MASK_GEMM,
    "multi_mask_grad_weight": replace(_MASKED_GRAD_WEIGHT, most_accumulators=64),
    "multi_mask_decode": Space(
        (("block_n", (64, 128)), ("block_k", (128, 256, 512)), _WARPS, ("num_stages", (1, 2, 3)))
    ),
    "block_gemm": _BLOCK_GEMM,
    "block_grad_values": _BLOCK_GRAD_VALUES,
}


def candidates(kernel: str, dtype: str, in_force: Answer, extent: str, machine: Machine) -> tuple[Answer, ...]:
    """The configurations to try, the one in force first, without repetition and in the same order every time.

    Args:
        kernel: a key of `configs.CONFIGS`.
        dtype: name of the dtype of the kernel's big operands.
        in_force: what the files answer.
        extent: "none", "small" or "full".
        machine: drops what cannot fit.
    """
    if extent == NONE:
        return (in_force,)
    space = SPACES.get(kernel)
    rules = list(_of_rules(kernel, dtype, machine.arch))
    found: list[Answer] = [in_force]
    if space is not None:
        base = in_force if in_force is not None else next(reversed(rules), None)
        around = _around(base, space, extent, machine) if base is not None else ()
        found += [config for config in (*around, *rules) if _fits(config, space, dtype, machine)]
        found += [None] * space.optional
    else:
        found += rules
    return tuple(dict.fromkeys(found))


def _of_rules(kernel: str, dtype: str, newest: str) -> Iterator[Config]:
    for arch in known_architectures():
        if number(arch) <= number(newest):
            yield from (rule.config for rule in load(arch).rules[kernel] if rule.dtype in (None, dtype))


def _around(base: Config, space: Space, extent: str, machine: Machine) -> Iterator[Config]:
    values = {name: _scaled(name, values, space, machine) for name, values in space.fields}
    if extent == SMALL:
        for name, of_field in values.items():
            for value in _steps(getattr(base, name), of_field):
                yield replace(base, **{name: value})
        return
    for first, second in itertools.combinations(values, 2):
        for one, other in itertools.product(values[first], values[second]):
            yield replace(base, **{first: one, second: other})


def _scaled(name: str, values: tuple[int, ...], space: Space, machine: Machine) -> tuple[int, ...]:
    factor = machine.multiprocessors if name in space.per_multiprocessor else 1
    return tuple(value * factor for value in values)


def _steps(value: int, values: tuple[int, ...]) -> Iterator[int]:
    """The next smaller and the next larger of `values`."""
    yield from [max(smaller)] if (smaller := [other for other in values if other < value]) else []
    yield from [min(larger)] if (larger := [other for other in values if other > value]) else []


def _fits(config: Config, space: Space, dtype: str, machine: Machine) -> bool:
    size = 4 if dtype == "float32" else 2
    tiles = sum(getattr(config, a) * getattr(config, b) for a, b in space.staged)
    if tiles * size * getattr(config, "num_stages", 1) > machine.shared_bytes:
        return False
    if space.accumulated is None:
        return True
    rows, columns = (getattr(config, name) for name in space.accumulated)
    return rows * columns <= space.most_accumulators * THREADS_PER_WARP * config.num_warps
