"""Problems and peers of `multi_lora_linear`: samples that each run their own adapter over one frozen layer.

Three kinds of work: the layer as it serves, without gradients; the update alone, added to a y that is there, as kernels
for decoding do; a training step. Adapters take turns, so that neighbours in the batch differ and nothing is sorted.

Peers are called through their public functions and modules only. One that is not installed is skipped with the reason.
vLLM's and punica's kernels are called as published; neither they nor anything else on a GPU has run here.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import multi_time, peers
from benchmarks.blocks import frozen_linear, objection, wanted
from benchmarks.peers import Layer, Peer
from benchmarks.problems import DTYPE_NAMES, FORWARD, Case, Spec
from peft_kernels import dispatch, functional
from peft_kernels.formats.pool import AdapterPool
from peft_kernels.functional.multi_lora_linear import flatten_adapters
from peft_kernels.problems import SCALING, Draw, add_chosen, nested

OP = "multi_lora_linear"
OPS = (OP,)
LAYER, DELTA, TRAINING = "layer", "delta", "training"
Add = Callable[[Tensor, Tensor], object]


@dataclass(frozen=True)
class ManySpec(Spec):
    """One problem: M rows, in samples of `tokens` rows, each of which runs one of `adapters`.

    `ranks`: those of the adapters, in turn; all have rank r where there are none, else r is the largest. `work`: LAYER,
    DELTA or TRAINING.
    """

    op: str = OP
    adapters: int = 1
    tokens: int = 1
    ranks: tuple[int, ...] = ()
    work: str = LAYER
    # The adapters of a single token are few bytes.
    most_sets: ClassVar[int] = 1024

    @property
    def label(self) -> str:
        dtypes = f"{DTYPE_NAMES[self.dtype]}-{DTYPE_NAMES[self.adapter_dtype]}"
        ranks = ".".join(map(str, self.ranks or (self.r,)))
        size = f"{self.samples}x{self.tokens}-K{self.k}-N{self.n}-r{ranks}-{dtypes}"
        return f"multi-{self.work}-{size}-{self.adapters}adapters"

    @property
    def samples(self) -> int:
        return self.m // self.tokens

    def rank(self, adapter: int) -> int:
        return self.ranks[adapter % len(self.ranks)] if self.ranks else self.r

    def ids(self) -> list[int]:
        """The adapter of each sample. Of more adapters than samples each sample has another."""
        return [i * max(1, self.adapters // self.samples) % self.adapters for i in range(self.samples)]

    def case(self, seed: int = 1, *, device: str | None = None) -> ManyCase:
        draw = Draw(device or self.device, seed)
        tensors = {"x": draw(self.dtype, self.samples, self.tokens, self.k)}
        if self.work == DELTA:
            tensors = {"x": tensors["x"].flatten(0, 1), "y": draw(self.dtype, self.m, self.n)}
        else:
            tensors["weight"] = draw(self.dtype, self.n, self.k, scale=self.k**-0.5)
        ranks = [self.rank(adapter) for adapter in range(self.adapters)]
        factors = {f"lora_As.{a}": draw(self.adapter_dtype, r, self.k, scale=self.k**-0.5) for a, r in enumerate(ranks)}
        factors |= {f"lora_Bs.{a}": draw(self.adapter_dtype, self.n, r, scale=r**-0.5) for a, r in enumerate(ranks)}
        tensors |= factors
        tensors["adapter_ids"] = draw.seeds(*self.ids())
        grads = ("x", *factors) if self.work == TRAINING else ()
        return ManyCase(OP, self.label, tensors, {"scalings": SCALING}, _eager, grads, spec=self)

    def dispatched(self) -> Any:
        """What dispatch chooses by; of the update alone, that of its layer."""
        layer = replace(self, work=LAYER) if self.work == DELTA else self
        index = torch.cuda.current_device() if self.device == "cuda" else None
        train = self.work == TRAINING
        return layer.case(device="meta").problem._replace(device=self.device, device_index=index, train=train)

    def flop(self, mode: str) -> int:
        base = 0 if self.work == DELTA else 2 * self.m * self.k * self.n
        ranks = self.tokens * sum(map(self.rank, self.ids()))
        low_rank = 2 * ranks * (self.k + self.n)
        forward = base + low_rank
        return forward if mode == FORWARD else forward + base + 2 * low_rank

    def bytes(self, mode: str) -> int:
        """The adapters are those that some sample runs, once each however many samples they have."""
        size = self.dtype.itemsize
        ranks = sum(map(self.rank, Counter(self.ids())))
        adapters = ranks * (self.k + self.n) * self.adapter_dtype.itemsize
        weight, x, y = (rows * columns * size for rows, columns in
                        ((self.k, self.n), (self.m, self.k), (self.m, self.n)))  # fmt: skip
        if self.work == DELTA:
            return x + adapters + 2 * y
        forward = x + weight + y + adapters
        return forward if mode == FORWARD else forward + y + weight + 2 * x + 2 * adapters


@dataclass(frozen=True)
class ManyCase(Case):
    """A case that knows its problem. `y`, of the update alone, is what the update is added to."""

    spec: ManySpec = field(kw_only=True)


def _eager(t: dict[str, Tensor]) -> Tensor:
    x, ids = t["x"].flatten(0, -2), t["adapter_ids"]
    lists = nested(t)
    y = t["y"] if "y" in t else F.linear(x, t["weight"])
    ids = ids.repeat_interleave(len(x) // len(ids)).unsqueeze(1)
    y = add_chosen(y, x, ids, None, *zip(lists["lora_As"], lists["lora_Bs"], strict=True))
    return y.view(*t["x"].shape[:-1], y.shape[1])


def layer_specs() -> list[ManySpec]:
    """Without gradients. On a GPU prefill and, last since vLLM is imported for it, decoding: the update alone."""
    bf16 = torch.bfloat16
    if torch.cuda.is_available():
        make = functools.partial(ManySpec, k=4096, n=4096, r=16, dtype=bf16, adapter_dtype=bf16, device="cuda")
        decode = [make(m, adapters=m, work=DELTA) for m in (1, 16, 64, 256)]
        return [make(4096, adapters=64, tokens=64), *decode]
    make = functools.partial(ManySpec, k=1024, n=1024, threads=2)
    served = [make(64 * tokens, r=16, adapters=adapters, tokens=tokens) for tokens in (8, 1) for adapters in (8, 64)]
    return [*served, make(512, r=96, adapters=8, tokens=8, ranks=(1, 8, 64, 96))]


def training_specs() -> list[ManySpec]:
    bf16 = torch.bfloat16
    if torch.cuda.is_available():
        return [ManySpec(8192, 4096, 4096, 16, bf16, bf16, device="cuda", adapters=8, tokens=512, work=TRAINING)]
    return [ManySpec(512, 1024, 1024, 16, threads=2, adapters=8, tokens=8, work=TRAINING)]


# Seconds that the update alone may take on an H200, by the number of tokens with an adapter each.
DELTA_SECONDS = {64: 12e-6, 256: 28e-6}
RIVALS = ("vllm", "punica")


def bars(spec: ManySpec) -> dict[str, float]:
    """What ours may take at most: `median_s` in seconds, `ratio_to_<peer>` in times of another."""
    if spec.work == TRAINING:
        return {"ratio_to_one adapter": 1 / multi_time.TRAINING_BAR}
    if spec.work == DELTA:
        found = dict.fromkeys((f"ratio_to_{rival}" for rival in RIVALS), 1 / 1.5)
        h200 = spec.device == "cuda" and "H200" in torch.cuda.get_device_name()
        return {"median_s": DELTA_SECONDS[spec.m], **found} if h200 and spec.m in DELTA_SECONDS else found
    same = (multi_time.SAMPLES, multi_time.SIZE, multi_time.SIZE, multi_time.RANK)
    faster = {case[:3]: case[3] for case in multi_time.CASES}.get((spec.tokens, spec.adapters, spec.dtype))
    here = spec.device == "cpu" and (spec.samples, spec.k, spec.n, spec.r) == same
    return {"ratio_to_peft": 1 / faster} if here and faster else {}


def facts(peer: Peer, spec: ManySpec) -> dict[str, Any]:
    """What a row of many adapters needs besides what every row has: bars where dispatch chose, and of the update
    alone."""
    rows = {"adapters": spec.adapters, "tokens_per_sample": spec.tokens, "ranks": list(spec.ranks), "work": spec.work}
    alone = peer.backend is not None and spec.work == DELTA
    return {**rows, "bars": bars(spec)} if alone or peer.backend == "auto" else rows


# Peers ------------------------------------------------------------------------------------------------------------


def _layer(case: ManyCase, call: Callable[[Tensor], Tensor], leaves: dict[str, Tensor], **more) -> Layer:
    spec, x = case.spec, leaves["x"]
    shape = (*x.shape[:-1], spec.n) if spec.work == TRAINING else (0,)
    frozen = tuple(tensor for name, tensor in case.tensors.items() if name not in leaves)
    return Layer(call, leaves, Draw(x.device, 3)(x.dtype, *shape), frozen=frozen, **more)


def _leaves(case: ManyCase) -> dict[str, Tensor]:
    return wanted(case) or {"x": case.tensors["x"]}


def _only_x(case: ManyCase) -> dict[str, Tensor]:
    return {"x": case.leaves()["x"]}


def _frozen(case: ManyCase) -> Layer:
    return _layer(case, functools.partial(F.linear, weight=case.tensors["weight"]), _only_x(case))


def _peft(case: ManyCase) -> Layer:
    """PEFT's mixed batch. It refuses training mode; in eval mode it gives gradients too."""
    from peft import LoraConfig, inject_adapter_in_model

    spec = case.spec
    model = nn.ModuleList([frozen_linear(case.tensors["weight"])])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is more than one adapter
        for adapter in range(spec.adapters):
            r = spec.rank(adapter)
            config = LoraConfig(r=r, lora_alpha=SCALING * r, target_modules=["0"])
            inject_adapter_in_model(config, model, adapter_name=f"a{adapter}", low_cpu_mem_usage=True)
    leaves = _only_x(case)
    for adapter in range(spec.adapters):
        for side in ("lora_A", "lora_B"):
            key = f"{side}s.{adapter}"
            weight = nn.Parameter(case.tensors[key].detach(), requires_grad=key in case.grads)
            getattr(model[0], side)[f"a{adapter}"].weight = weight
            leaves |= {key: weight} if key in case.grads else {}
    names = [f"a{adapter}" for adapter in spec.ids()]
    return _layer(case, functools.partial(model.eval()[0], adapter_names=names), leaves)


class _OneAdapter(Peer):
    """Its problem is that of a single adapter on the same rows."""

    def problem(self, spec: Spec, seed: int = 1) -> ManyCase:
        assert isinstance(spec, ManySpec)
        return replace(spec, adapters=1).case(seed)


def _one_adapter(case: ManyCase) -> Layer:
    leaves = wanted(case)

    def call(x: Tensor) -> Tensor:
        lora_A, lora_B = leaves["lora_As.0"], leaves["lora_Bs.0"]
        return functional.lora_linear(x, case.tensors["weight"], lora_A, lora_B, scaling=SCALING)

    return _layer(case, call, leaves)


def _ours(backend: str | None, case: ManyCase) -> Layer:
    if case.spec.work == DELTA:
        assert backend is not None
        return _adding(case, DELTAS[backend](case))
    leaves = _leaves(case)
    arguments = nested({name: leaves.get(name, tensor) for name, tensor in case.tensors.items() if name != "x"})
    call = functools.partial(functional.multi_lora_linear, **arguments, **case.options)
    return _layer(case, call, leaves, context=lambda: dispatch.use_backend(backend))


def _pool(case: ManyCase) -> Layer:
    """The ids are looked up before, as once for all layers of a model."""
    spec, lists = case.spec, nested(case.tensors)
    numbers = sum((spec.rank(adapter) + 8) * (spec.k + spec.n) for adapter in range(spec.adapters))
    pool = AdapterPool(
        {"layer": (spec.n, spec.k)}, budget=numbers * spec.adapter_dtype.itemsize + 1024 * spec.adapters,
        slots=spec.adapters, dtype=spec.adapter_dtype, device=spec.device,
    )  # fmt: skip
    for adapter, factors in enumerate(zip(lists["lora_As"], lists["lora_Bs"], strict=True)):
        pool.load(str(adapter), {"layer": factors}, scaling=SCALING)
    layer, ids = pool.layer("layer"), pool.ids([str(adapter) for adapter in spec.ids()])

    def call(x: Tensor) -> Tensor:
        return functional.multi_lora_linear(x, lists["weight"], layer, None, ids)

    return _layer(case, call, _only_x(case), context=lambda: dispatch.use_backend(None))


def _adding(case: ManyCase, add: Add) -> Layer:
    """`add(y, x)` adds the update to y [M, N] in place: to one that is there, or to the base product of the layer."""
    spec = case.spec
    if spec.work != DELTA:

        def whole(x: Tensor) -> Tensor:
            y = F.linear(x, case.tensors["weight"])
            add(y.view(spec.m, spec.n), x.view(spec.m, spec.k))
            return y

        return _layer(case, whole, _only_x(case))
    kept = case.tensors["y"].clone()

    def added(x: Tensor, y: Tensor) -> Tensor:
        add(y, x)
        return y

    return _layer(
        case, functools.partial(added, y=kept), _only_x(case),
        checked=lambda x: added(x, case.tensors["y"].clone()),
    )  # fmt: skip


def _ids_of_rows(case: ManyCase) -> Tensor:
    return case.tensors["adapter_ids"].repeat_interleave(case.spec.tokens)


def _table(case: ManyCase):
    """The adapters with their table, which stays where it is: that of a pool does, and a captured graph reads it."""
    lists = nested(case.tensors)
    adapters = flatten_adapters(OP, (None,), (lists["lora_As"],), (lists["lora_Bs"],), SCALING)
    table = adapters.table(case.tensors["x"].device)
    return SimpleNamespace(table=lambda device: table, widths=adapters.widths, dtype=adapters.dtype)


def _cuda_delta(case: ManyCase) -> Add:
    cuda: Any = dispatch.implementation(OP, "cuda")
    adapters, ids = _table(case), _ids_of_rows(case).unsqueeze(1)
    return lambda y, x: cuda.add_updates([y], x, adapters, ids, None)


def _triton_delta(case: ManyCase) -> Add:
    decode = importlib.import_module("peft_kernels.kernels.triton._multi_decode").multi_decode
    adapters, ids = _table(case), _ids_of_rows(case).unsqueeze(1)
    table = adapters.table(ids.device)
    return lambda y, x: decode(x, [y], table, adapters.widths, ids, None, adapters.dtype)


# What of ours adds the update alone.
DELTAS: dict[str, Callable[[ManyCase], Add]] = {"cuda": _cuda_delta, "triton": _triton_delta}


def _stacks(case: ManyCase) -> tuple[Tensor, Tensor]:
    """A [adapters, r, K] and B [adapters, N, r]."""
    lists = nested(case.tensors)
    return torch.stack(lists["lora_As"]), torch.stack(lists["lora_Bs"])


def _vllm(case: ManyCase) -> Layer:
    """vLLM's shrink and expand, the scaling in shrink. What it makes of the ids for a step is made before."""
    ops = importlib.import_module("vllm.lora.ops.triton_ops")
    spec, (lora_As, lora_Bs) = case.spec, _stacks(case)
    meta = ops.LoRAKernelMeta.make(spec.adapters, spec.m, device=spec.device)
    meta.prepare_tensors(_ids_of_rows(case))
    newer = "specialize_active_lora" in inspect.signature(meta.meta_args).parameters
    arguments = meta.meta_args(spec.m, False) if newer else meta.meta_args(spec.m)

    def add(y: Tensor, x: Tensor) -> None:
        low = torch.empty((1, spec.m, spec.r), dtype=torch.float32, device=x.device)
        ops.lora_shrink(x, [lora_As], low, *arguments, SCALING)
        ops.lora_expand(low, [lora_Bs], y, *arguments, offset_start=0, add_inputs=True)

    return _adding(case, add)


def _punica(case: ManyCase) -> Layer:
    """punica's BGMV, over weights of a model of one layer."""
    add_lora = importlib.import_module("punica.ops").add_lora_bgmv
    lora_As, lora_Bs = (stack.unsqueeze(1) for stack in _stacks(case))
    ids = _ids_of_rows(case)
    return _adding(case, lambda y, x: add_lora(y, x, lora_As, lora_Bs, ids, 0, SCALING))


def _not_alone(other: peers.Reason, why: str) -> peers.Reason:
    """The reason of a peer that has no way to add the update alone."""
    return lambda spec: why if _work(spec) == DELTA else other(spec)


def _work(spec: Spec) -> str:
    assert isinstance(spec, ManySpec)
    return spec.work


def _always(spec: Spec) -> None:
    return None


def _one_adapter_reason(spec: Spec) -> str | None:
    return None if _work(spec) == TRAINING else "many adapters are compared with one in training"


def _pool_reason(spec: Spec) -> str | None:
    return "a pool's adapters are not trained" if _work(spec) == TRAINING else None


def _backend_reason(backend: str, spec: Spec) -> str | None:
    assert isinstance(spec, ManySpec)
    if backend == "reference" and spec.adapters > 8:
        return "the specification, a loop over adapters, is measured with 8 at most, to bound the time"
    if spec.work == DELTA and backend not in DELTAS:
        return f"the {backend} implementation does not add the update alone"
    return objection(backend, spec)


def _rival_reason(name: str, module: str, spec: Spec) -> str | None:
    assert isinstance(spec, ManySpec)
    if spec.device != "cuda":
        return f"{name} needs a GPU"
    if spec.work == TRAINING:
        return f"{name} gives no gradients"
    if spec.ranks or spec.adapter_dtype != spec.dtype or spec.dtype == torch.float32:
        return f"{name} needs adapters of one rank in x's 16-bit dtype"
    return peers.installed(module)(spec)


def _punica_reason(spec: Spec) -> str | None:
    if _work(spec) == LAYER:
        return "punica's BGMV is its kernel for decoding"
    return _rival_reason("punica", "punica", spec)


def _backend_peer(backend: str) -> Peer:
    return Peer(
        f"ours ({backend})", functools.partial(_ours, backend), functools.partial(_backend_reason, backend),
        backend=backend, accuracy=1.2,
    )  # fmt: skip


_WHOLE = "it computes whole layers"
FROZEN = Peer("frozen", _frozen, _not_alone(_always, "the base product is left out"), frozen=True)
PEFT = Peer("peft", _peft, _not_alone(peers.installed("peft"), _WHOLE))
ONE_ADAPTER = _OneAdapter("one adapter", _one_adapter, _one_adapter_reason, accuracy=1.2)
AUTO = Peer("ours (auto)", functools.partial(_ours, None), _not_alone(_always, _WHOLE), backend="auto", accuracy=1.2)
POOL = Peer("ours, pool", _pool, _not_alone(_pool_reason, _WHOLE), backend="auto", accuracy=1.2)
VLLM = Peer("vllm", _vllm, functools.partial(_rival_reason, "vLLM", "vllm"), patches=True)
PUNICA = Peer("punica", _punica, _punica_reason, patches=True)
BASELINES = (PEFT, FROZEN, ONE_ADAPTER, VLLM, PUNICA)
PEERS = (
    FROZEN, PEFT, ONE_ADAPTER, AUTO, POOL,
    *map(_backend_peer, ("composed", "triton", "cuda", "cpu", "reference")),
    VLLM, PUNICA,
)  # fmt: skip
