"""`multi_lora_linear` and `multi_lora_linear_group`: linear layers whose rows choose their own low-rank updates."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_kernels import ops
from peft_kernels.checks import (
    check_bias,
    check_device,
    check_finite,
    check_floating,
    check_probability,
    check_rank,
    check_same_dtype,
    check_seed,
    check_shape,
    check_tensor,
    check_weight,
    shape_text,
)
from peft_kernels.formats.adapter_table import AdapterLists, Adapters, PoolAdapters
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.formats.pool import PoolLayer
from peft_kernels.functional.lora_linear import PLAIN, is_dtensor
from peft_kernels.functional.lora_linear_group import check_input
from peft_kernels.ops._weights import split
from peft_kernels.ops.philox_dropout import new_seeds

_OP = "multi_lora_linear"

CHECK_IDS_VARIABLE = "PEFT_KERNELS_CHECK_IDS"
"""Set to 1, adapter ids on a GPU are checked as well, which waits for the GPU at every call."""

Factors = Sequence[Tensor | None]

_SHAPE, _DTYPE, _DEVICE = map(operator.attrgetter, ("shape", "dtype", "device"))


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_As: Factors | PoolLayer,
    lora_Bs: Factors | None,
    adapter_ids: Tensor,
    *,
    scalings: float | Sequence[float | None] | None = None,
    bias: Tensor | None = None,
    adapter_weights: Tensor | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
) -> Tensor:
    """A linear layer each row of which runs its own adapter, in one pass over the batch.

    y[m] = x[m] Wᵀ + b + Σ_i w[m, i] s_a (drop(x)[m] A_aᵀ) B_aᵀ,   a = adapter_ids[m, i]

    Rows may come in any order, adapters have any ranks and lie where they are. Forward and backward: the gradients of x
    and of every A and B, those of adapters that no row chose being zero. Results are deterministic; in the kernels for
    few rows (decode) a row has the same bits whatever its neighbours are. Second derivatives raise RuntimeError.

    Args:
        x: [..., in_features]; float32, float16, bfloat16 or float64, any strides.
        weight: [out_features, in_features] in x's dtype, or an `NF4Weight`, as in `lora_linear`.
        lora_As: A [r_a, in_features] of each adapter a, 1 <= r_a <= 512, all in one dtype; None for an adapter that has
            nothing in this layer. Or a layer of an `AdapterPool`, whose slots are the ids.
        lora_Bs: B [out_features, r_a] of each adapter, in the dtype of the As; None with a pool.
        adapter_ids: int32 or int64, of x's device: which adapter each row of x runs, in [-1, number of adapters), -1
            for none. One id per row, shape x.shape[:-1], or one per sample, shape x.shape[:1]. With `adapter_weights`
            several per row or sample: one more dimension, [..., k]. Checked where they are on a CPU, and on a GPU when
            the environment sets PEFT_KERNELS_CHECK_IDS=1: else a GPU kernel takes an id out of range for -1.
        scalings: s_a, usually lora_alpha / r: one for all or one for each adapter; None with a pool, which has its own.
        bias: [out_features] in x's dtype (over an `NF4Weight` in any), or None.
        adapter_weights: w, floating point, in the shape of `adapter_ids`, or None for one adapter per row with w = 1.
            It gets a gradient.
        dropout_p: probability, in [0, 1], that an element of x is zeroed for the adapters: one for all or one for each.
        training: no dropout when False.
        seed: as for `lora_linear`; the mask is that of `philox_dropout(x, p, seed)` whichever adapters run.

    Returns:
        y: [..., out_features] in x's dtype (the autocast dtype under autocast).

    Raises:
        ValueError: a shape, length, device or number does not fit, or an id on a CPU is out of range; the message names
            the argument.
        TypeError: an argument is of the wrong type or dtype.
        NotImplementedError: sharded tensors (DTensor).
    """
    biases = None if bias is None else (bias,)
    pool = isinstance(lora_As, PoolLayer)
    (y,) = _call(
        _OP, x, (weight,), (lora_As,), None if pool and lora_Bs is None else (lora_Bs,), adapter_ids,
        (scalings,) if isinstance(scalings, Sequence) else scalings, biases, adapter_weights, dropout_p, training, seed,
    )  # fmt: skip
    return y


def multi_lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor | NF4Weight],
    lora_As: Sequence[Factors | PoolLayer | None],
    lora_Bs: Sequence[Factors | None] | None,
    adapter_ids: Tensor,
    *,
    scalings: float | Sequence[Any] | None = None,
    biases: Sequence[Tensor | None] | None = None,
    adapter_weights: Tensor | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Several layers over one x, such as q/k/v or gate/up, each row of which runs its own adapter in all of them.

    y_j as in `multi_lora_linear` with W_j, b_j and the factors of layer j. The op is the same one, and on a GPU one
    launch serves all layers.

    Args:
        x, adapter_ids, adapter_weights, dropout_p, training: as there.
        weights: of each layer, [out_features_j, in_features].
        lora_As: for each layer its As, one for each adapter (None where an adapter has nothing in that layer), or None
            for a layer without any; or for each layer a layer of one `AdapterPool`.
        lora_Bs: the Bs in the same nesting; None with a pool.
        scalings: one for all, or for each layer one for all or one for each adapter; None with a pool.
        biases: of each layer, or None for no biases.
        seed: an integer s, with which layer j takes the mask of `philox_dropout(x, p, seed=s + j)`; an int64 tensor
            [layers]; or None to draw from torch's generator.

    Returns:
        A tuple with y_j [..., out_features_j] of each layer.

    Raises:
        ValueError, TypeError: as there.
    """
    return _call(
        "multi_lora_linear_group", x, weights, lora_As, lora_Bs, adapter_ids, scalings, biases, adapter_weights,
        dropout_p, training, seed,
    )  # fmt: skip


def _call(
    op, x, weights, lora_As, lora_Bs, adapter_ids, scalings, biases, adapter_weights, dropout_p, training, seed
) -> tuple[Tensor, ...]:  # fmt: skip
    if not weights:
        raise ValueError(f"{op}: weights is empty; expected at least one")
    biases = [None] * len(weights) if biases is None else list(biases)
    if len(biases) != len(weights):
        raise ValueError(f"{op}: biases has {len(biases)} entries; expected one for each of the {len(weights)} weights")
    adapters = flatten_adapters(op, weights, lora_As, lora_Bs, scalings)
    signature = _signature(x, weights, biases, adapters)
    if signature is None or signature not in _verified:
        check_input(op, x)
        _check_layers(op, x, weights, biases)
        check_adapters(op, x, weights, adapters)
        refuse_dtensors(op, x, *weights, *adapters.lora_As, *adapters.lora_Bs)
        _remember(signature)
    ids, mix = adapter_choice(op, x, adapter_ids, adapter_weights, adapters.count)
    dropout_ps, seeds = dropout_of(op, dropout_p, training, seed, adapters.count, len(weights), x.device)
    return ops.multi_lora_linear.multi_lora_linear(
        x, list(weights), biases, adapters, ids, mix, dropout_ps, seeds
    )  # fmt: skip


def refuse_dtensors(op: str, *tensors: Any) -> None:
    """A table of addresses knows nothing of shards.

    Raises:
        NotImplementedError: one of the tensors (None is passed over) is a DTensor, and nothing is being traced.
    """
    special = [tensor for tensor in tensors if tensor is not None and type(tensor) not in PLAIN]
    if special and not torch.compiler.is_compiling() and is_dtensor(*special):
        raise NotImplementedError(f"{op}: DTensors are not supported; expected tensors of one process")


def flatten_adapters(op: str, weights, lora_As, lora_Bs, scalings) -> Adapters:
    """The nested factors as one list of what is there, or the layers of a pool.

    Raises:
        ValueError: lengths or nestings do not fit, or a scaling is not finite.
        TypeError: a pool beside tensors, or a scaling that is no number.
    """
    if len(lora_As) != len(weights) or (lora_Bs is not None and len(lora_Bs) != len(weights)):
        raise ValueError(
            f"{op}: lora_As has {len(lora_As)} and lora_Bs {'no' if lora_Bs is None else len(lora_Bs)} entries; "
            f"expected one for each of the {len(weights)} weights"
        )
    if any(isinstance(layer, PoolLayer) for layer in lora_As):
        return _pool_adapters(op, weights, lora_As, lora_Bs, scalings)
    return flatten_lists(op, weights, lora_As, lora_Bs, scalings)


def flatten_lists(op: str, weights, lora_As, lora_Bs, scalings) -> AdapterLists:
    """`flatten_adapters` where there is no pool: for each layer of `weights` a list of A [r, in] and one of B [out, r],
    None for an adapter that has neither there.

    Raises:
        As `flatten_adapters`.
    """
    if lora_Bs is None:
        raise TypeError(f"{op}: lora_Bs is None; expected the B of each A (None goes with an AdapterPool)")
    count = max([0, *(len(layer) for layer in lora_As if layer is not None)])  # dynamo knows no `default`
    flat = AdapterLists([], [], [], [], [], [1] * len(weights), count)
    for j, (layer_As, layer_Bs) in enumerate(zip(lora_As, lora_Bs, strict=True)):
        if layer_As is None and layer_Bs is None:
            continue
        if layer_As is None or layer_Bs is None or not len(layer_As) == len(layer_Bs) == count:
            have = [0 if side is None else len(side) for side in (layer_As, layer_Bs)]
            raise ValueError(
                f"{op}: {_layer('lora_As', j, weights)} has {have[0]} adapters and lora_Bs {have[1]}; "
                f"expected {count} of each, None for those that have nothing there"
            )
        layer_scalings = _scalings_of(op, scalings, j, weights, count)
        if not _extend(flat, j, layer_As, layer_Bs, layer_scalings):
            _append(op, flat, j, layer_As, layer_Bs, layer_scalings, weights)
    return flat


def _layer(name: str, j: int, weights) -> str:
    """The argument's name in messages: with an index where a call has several weights."""
    return name if len(weights) == 1 else f"{name}[{j}]"


def _scalings_of(op: str, scalings, j: int, weights, count: int) -> list[Any]:
    """One for each adapter of layer j, of one for all or of a list with one, or a list, for each layer; not yet checked
    to be finite. TypeError for None, ValueError for another length."""
    if scalings is None:
        raise TypeError(f"{op}: scalings is None; expected a number for all adapters or one for each")
    name = "scalings"
    if isinstance(scalings, Sequence):
        if len(scalings) != len(weights):
            raise ValueError(
                f"{op}: scalings has {len(scalings)} entries; expected one for each of the {len(weights)} weights"
            )
        scalings, name = scalings[j], _layer("scalings", j, weights)
    if not isinstance(scalings, Sequence):
        return [scalings] * count
    if len(scalings) != count:
        raise ValueError(f"{op}: {name} has {len(scalings)} entries; expected one for each of the {count} adapters")
    return list(scalings)


def _extend(flat: AdapterLists, j: int, layer_As, layer_Bs, scalings) -> bool:
    """Appends a layer in which every adapter has plain matrices and a float, as most have. False, and nothing is
    appended, where each takes a look by itself: of many adapters that costs more than their products."""
    if torch.compiler.is_compiling() or not PLAIN.issuperset(map(type, (*layer_As, *layer_Bs))):
        return False
    if not {float}.issuperset(map(type, scalings)) or not all(map(math.isfinite, scalings)):
        return False
    shapes = list(map(_SHAPE, layer_As))
    if set(map(len, shapes)) != {2}:
        return False
    flat.append(j, layer_As, layer_Bs, scalings, [shape[0] for shape in shapes])
    return True


def _append(op, flat: AdapterLists, j: int, layer_As, layer_Bs, scalings, weights) -> None:
    """As `_extend`, one adapter at a time: skips those without matrices, raises for half of one and for no number."""
    for adapter, (a, b, scaling) in enumerate(zip(layer_As, layer_Bs, scalings, strict=True)):
        if a is None and b is None:
            continue
        if a is None or b is None:
            missing, other = ("A", "B") if a is None else ("B", "A")
            raise ValueError(f"{op}: adapter {adapter} has a {other} but no {missing}; expected both or neither")
        check_tensor(op, f"{_layer('lora_As', j, weights)}[{adapter}]", a)
        check_finite(op, "scalings", scaling)
        flat.lora_As.append(a)
        flat.lora_Bs.append(b)
        flat.outputs.append(j)
        flat.adapters.append(adapter)
        flat.scalings.append(scaling * 1.0)
        if a.ndim >= 2 and a.shape[-2] > flat.widths[j]:
            flat.widths[j] = a.shape[-2]


def _pool_adapters(op, weights, layers, lora_Bs, scalings) -> PoolAdapters:
    """The adapters of a pool, whose B and scalings are its own; TypeError where they are given, or pools are mixed."""
    for name, value in (("lora_Bs", lora_Bs), ("scalings", scalings)):
        if value is not None:
            raise TypeError(f"{op}: {name} is given beside an AdapterPool, which has its own; expected None")
    for layer in layers:
        if not isinstance(layer, PoolLayer) or layer.pool is not layers[0].pool:
            raise TypeError(f"{op}: lora_As mixes an AdapterPool with something else; expected layers of one pool")
    return layers[0].pool.adapters(layers)


# Signatures of calls whose arguments were found valid: checking a thousand adapters anew costs more than their matmuls.
_verified: set[tuple] = set()


def _signature(x: Tensor, weights, biases, adapters: Adapters) -> tuple | None:
    """Everything that the checks of operands look at, or None where a check by itself is due (subclasses, tracing)."""
    if torch.compiler.is_compiling():
        return None
    firsts, others, layouts = split(weights)
    lora_As, lora_Bs = adapters.lora_As, adapters.lora_Bs
    factors, tensors = (*lora_As, *lora_Bs), (*firsts, *others, *(bias for bias in biases if bias is not None))
    if type(x) not in PLAIN or not PLAIN.issuperset(map(type, tensors)) or not PLAIN.issuperset(map(type, factors)):
        return None
    # Of a thousand adapters few differ in what is checked: sets of that are compared faster than lists.
    kinds = {*map(_DTYPE, factors), *map(_DEVICE, factors)}
    if len(kinds) > 2:
        return None
    shapes = frozenset(zip(adapters.outputs, map(_SHAPE, lora_As), map(_SHAPE, lora_Bs), strict=False))
    properties: list[Any] = [(t.shape, t.dtype, t.device) for t in tensors]
    if layouts:
        properties += [*layouts, *(weight.shape for weight in weights)]
        properties += [t.is_contiguous() for t in (*firsts, *others)]
    if isinstance(adapters, PoolAdapters):
        properties += [adapters.dtype, adapters.arena.device, *adapters.sizes]
    autocast = torch.is_autocast_enabled(x.device.type)
    absent = [bias is None for bias in biases]
    return (x.ndim > 0, x.shape[-1:], x.dtype, x.device, autocast, shapes, frozenset(kinds), *absent, *properties)


def _remember(signature: tuple | None) -> None:
    if signature is not None:
        if len(_verified) >= 1024:
            _verified.clear()
        _verified.add(signature)


def _check_layers(op: str, x: Tensor, weights, biases) -> None:
    """Raises for the first weight that is not [N, K], or bias that is not [N], of x's dtype and device, x [..., K]."""
    k = x.shape[-1]
    for j, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        name = "weight" if len(weights) == 1 else f"weights[{j}]"
        check_weight(op, name, weight, x, ("out_features", k), f"x has {k} features")
        if bias is not None:
            check_bias(op, "bias" if len(weights) == 1 else f"biases[{j}]", bias, name, weight)


def check_adapters(op: str, x: Tensor, weights, adapters: Adapters) -> None:
    """Checks the factors against weights [out, in], or stacks of factors against stacks of weights [experts, out, in].

    Raises:
        ValueError: a shape, rank or device does not fit.
        TypeError: no floating-point tensor, or two dtypes.
    """
    k = x.shape[-1]
    if isinstance(adapters, PoolAdapters):
        for weight, size in zip(weights, adapters.sizes, strict=True):
            if tuple(weight.shape) != tuple(size):
                raise ValueError(
                    f"{op}: the layer of the pool is for a weight of shape {shape_text(size)}; got one of shape "
                    f"{shape_text(weight.shape)}"
                )
        check_device(op, "the pool", adapters.arena, x.device)
        return
    for a, b, j, adapter in zip(adapters.lora_As, adapters.lora_Bs, adapters.outputs, adapters.adapters, strict=True):
        name_a, name_b = (f"{_layer(f'lora_{m}s', j, weights)}[{adapter}]" for m in "AB")
        *experts, n, _ = weights[j].shape
        each = "".join(f"weight has {e} experts and " for e in experts)
        check_floating(op, name_a, a)
        check_shape(op, name_a, a, (*experts, "r", k), f"{each}x has {k} features")
        r = a.shape[-2]
        check_rank(op, "r", r)
        check_floating(op, name_b, b)
        check_shape(op, name_b, b, (*experts, n, r), f"{each}weight has {n} output features and {name_a} rank {r}")
        check_same_dtype(op, name_a, a, adapters.lora_As[0].dtype, "the first adapter")
        check_same_dtype(op, name_b, b, a.dtype, name_a)
        check_device(op, name_a, a, x.device)
        check_device(op, name_b, b, x.device)


def adapter_choice(
    op: str, x: Tensor, adapter_ids: Tensor, adapter_weights: Tensor | None, count: int, name: str = "adapter_ids"
) -> tuple[Tensor, Tensor | None]:
    """The ids of each row of x, int64 [M, k], and their weights [M, k]; `name` is what the op calls its ids.

    Raises:
        TypeError: ids or weights of another type.
        ValueError: shapes or devices that do not fit, or an id out of range.
    """
    check_tensor(op, name, adapter_ids)
    if adapter_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} has dtype {adapter_ids.dtype}; expected torch.int32 or torch.int64")
    check_device(op, name, adapter_ids, x.device)
    refuse_dtensors(op, adapter_ids, adapter_weights)
    batch = x.shape[:-1]
    several = adapter_weights is not None
    if adapter_weights is not None:
        check_floating(op, "adapter_weights", adapter_weights)
        check_device(op, "adapter_weights", adapter_weights, x.device)
        if adapter_weights.shape != adapter_ids.shape:
            raise ValueError(
                f"{op}: adapter_weights has shape {shape_text(adapter_weights.shape)}; expected that of {name}, "
                f"{shape_text(adapter_ids.shape)}"
            )
    given = adapter_ids.shape[:-1] if several else adapter_ids.shape
    if (several and adapter_ids.ndim == 0) or given not in (batch, batch[:1]):
        tail = ", k" if several else ""
        raise ValueError(
            f"{op}: {name} has shape {shape_text(adapter_ids.shape)}, but x has shape {shape_text(x.shape)}; "
            f"expected ({', '.join(map(str, batch))}{tail}), one per row, or ({batch[0] if batch else ''}{tail}), "
            "one per sample"
        )
    _check_range(op, adapter_ids, count, name)
    ids = adapter_ids if adapter_ids.dtype == torch.int64 else adapter_ids.to(torch.int64)
    ids = _per_row(ids, given, batch, several)
    if adapter_weights is None:
        return ids, None
    wide = torch.promote_types(torch.float32, x.dtype)
    return ids, _per_row(adapter_weights.to(wide), given, batch, True)


def _per_row(values: Tensor, given: torch.Size, batch: torch.Size, several: bool) -> Tensor:
    """[M, k], where `values` may have one entry per sample only."""
    if not several and given == batch and values.is_contiguous():
        return values.view(-1, 1)
    if not several:
        values = values.unsqueeze(-1)
    if given != batch:
        inner = batch[1:]
        values = values.view(*given, *[1] * len(inner), values.shape[-1]).expand(*batch, values.shape[-1])
    return values.reshape(batch.numel(), values.shape[-1]).contiguous()


def reads_ids(device: torch.device) -> bool:
    """Whether ids on this device are checked: on a CPU always, elsewhere where the environment asks for it."""
    return device.type == "cpu" or (device.type != "meta" and os.environ.get(CHECK_IDS_VARIABLE) == "1")


def _check_range(op: str, adapter_ids: Tensor, count: int, name: str) -> None:
    """ValueError for an id outside [-1, count), where ids are read at all: on a GPU that waits for it."""
    if adapter_ids.numel() == 0 or torch.compiler.is_compiling() or type(adapter_ids) is not Tensor:
        return
    if not reads_ids(adapter_ids.device):
        return
    low, high = (int(value) for value in torch.aminmax(adapter_ids))
    if low < -1 or high >= count:
        wrong = low if low < -1 else high
        raise ValueError(f"{op}: {name} holds {wrong}; expected ids in [-1, {count}), -1 for none")


def dropout_of(
    op: str, dropout_p, training: bool, seed, count: int, projections: int, device: torch.device
) -> tuple[list[float], Tensor | None]:
    """(probability of each adapter, seed of each projection); empty and None where nothing is dropped."""
    ps = list(dropout_p) if isinstance(dropout_p, Sequence) else [dropout_p]
    if isinstance(dropout_p, Sequence) and len(ps) != count:
        raise ValueError(f"{op}: dropout_p has {len(ps)} entries; expected one for each of the {count} adapters")
    for p in ps:
        check_probability(op, "dropout_p", p)
    if not training or not any(ps):
        return [], None
    ps = [p * 1.0 for p in ps] * (1 if isinstance(dropout_p, Sequence) else count)
    if seed is None:
        return ps, new_seeds(device, projections)
    if not isinstance(seed, Tensor):
        check_seed(op, seed, device)
        return ps, torch.arange(seed, seed + projections, dtype=torch.int64, device=device)
    if seed.dtype != torch.int64:
        raise TypeError(f"{op}: seed has dtype {seed.dtype}; expected torch.int64")
    if seed.numel() != projections:
        raise ValueError(f"{op}: seed has shape {shape_text(seed.shape)}; expected ({projections},)")
    check_device(op, "seed", seed, device)
    return ps, seed.reshape(projections)
