"""Problems and peers of pruned weights: `masked_linear`, `sparse_linear` and `sparse_delta_linear` against the dense
layer, against masks multiplied in each call (what `torch.nn.utils.prune` and scripts do) and against PEFT's SHiRA.

Peers are called through their public functions and modules only. One that is not installed is skipped with the reason.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.blocks import objection, of_case, wanted
from benchmarks.peers import Layer, Peer
from benchmarks.problems import DTYPE_NAMES, FORWARD, FORWARD_BACKWARD, Case, Spec
from peft_kernels import dispatch, problems
from peft_kernels.formats.positions import Positions
from peft_kernels.formats.sparse import SparseWeight
from peft_kernels.problems import Draw, Shape

MASKED, SPARSE, DELTA = "masked_linear", "sparse_linear", "sparse_delta_linear"
OPS = (MASKED, SPARSE, DELTA)
SHORT_NAMES = {MASKED: "masked", SPARSE: "sparse", DELTA: "chosen"}


@dataclass(frozen=True)
class PrunedSpec(Spec):
    """One problem: M rows, K in_features, N out_features, and how many of the weights are kept (or chosen).

    `layout`: of `sparse_linear`; blocks are of 64. `clean`, of `masked_linear`: W is 0 outside its mask and the op is
    told so.
    """

    op: str = MASKED
    density: float = 0.5
    layout: str = ""
    clean: bool = False
    # A weight of few rows takes a fraction of a dense one's bytes.
    most_sets: ClassVar[int] = 256

    @property
    def label(self) -> str:
        kind = self.layout or ("clean" if self.clean else "")
        name = "-".join(filter(None, (SHORT_NAMES[self.op], kind)))
        return f"{name}-M{self.m}-K{self.k}-N{self.n}-{DTYPE_NAMES[self.dtype]}-{100 * self.density:g}%"

    def case(self, seed: int = 1, *, device: str | None = None) -> Case:
        shape = Shape((self.m,), self.n, self.k, 1, self.dtype, self.dtype)
        draw = Draw(device or self.device, seed)
        if self.op == MASKED:
            made = problems.masked_linear(shape, draw, self.density, weight_is_masked=self.clean)
        elif self.op == SPARSE:
            made = problems.sparse_linear(shape, draw, self.layout, self.density, block=64)
        else:
            made = problems.sparse_delta_linear(shape, draw, self.density)
        return made.without("bias")

    def dispatched(self) -> Any:
        """What dispatch chooses by."""
        return _dispatched(self)

    def flop(self, mode: str) -> int:
        """Products with dropped weights are not needed, except where they are as cheap as leaving them out: under a
        mask, and beside chosen weights."""
        product = 2 * self.m * self.k * self.n
        if self.op == SPARSE:
            trains = self.layout == "block"
            return round(product * self.density * (1 if mode == FORWARD else 3 if trains else 2))
        return product if mode == FORWARD else product * (3 if self.op == MASKED else 2)

    def bytes(self, mode: str) -> int:
        """Each tensor read or written once a direction, dropped weights as a bit at most."""
        size, weights = self.dtype.itemsize, self.n * self.k
        x, y = self.m * self.k * size, self.m * self.n * size
        kept = round(weights * self.density * size)
        weight = kept + (0 if self.layout == "block" else weights // 8)
        if self.op != SPARSE:
            weight = weights * size + (weights // 8 if self.op == MASKED else kept)
        forward = x + weight + y
        # Backward reads dY, W and x; it writes dx and the gradient of W or of its values.
        grad = {MASKED: weights * size, DELTA: kept}.get(self.op, kept if self.layout == "block" else 0)
        return forward if mode == FORWARD else forward + y + weight + 2 * x + grad


@functools.cache
def _dispatched(spec: PrunedSpec) -> Any:
    """Of tensors that are there: how dense a compressed weight is, is known of numbers only."""
    return spec.case().problem


def specs(mode: str) -> list[PrunedSpec]:
    """What this machine measures in a mode."""
    if torch.cuda.is_available():
        return _gpu_specs(mode)
    make = functools.partial(PrunedSpec, k=4096, n=1024, r=0, threads=2)
    if mode == FORWARD:
        return [make(m, op=SPARSE, layout="csr", density=0.1) for m in (1, 16, 256)]
    return [make(256), make(256, op=SPARSE, layout="block", density=0.1), make(256, op=DELTA, density=0.01)]


def _gpu_specs(mode: str) -> list[PrunedSpec]:
    make = functools.partial(PrunedSpec, k=4096, n=4096, r=0, dtype=torch.bfloat16, device="cuda")
    large = [make(8192), make(8192, clean=True)]
    large += [make(8192, op=SPARSE, layout="block", density=density) for density in (0.1, 0.5)]
    if mode == FORWARD_BACKWARD:
        return [*large, make(8192, op=DELTA, density=0.01)]
    few = [make(1, op=SPARSE, layout="bitmap", density=density) for density in (0.5, 0.3, 0.1)]
    few += [make(m, op=SPARSE, layout="csr", density=density) for m in (1, 8) for density in (0.3, 0.1, 0.05)]
    return [*few, *large]


# Times of the dense layer, on an H200, that a pruned one of 4096 x 4096 may take.
_DECODING = {0.5: 0.75, 0.3: 0.55, 0.1: 0.40}


def bars(spec: PrunedSpec, mode: str) -> dict[str, float]:
    """What ours may take at most, in times of a peer; the bars were set for one machine each."""
    if spec.device == "cpu":
        if mode == FORWARD or (spec.k, spec.n, spec.m) != (4096, 1024, 256):
            return {}
        return {MASKED: {"ratio_to_mask in each call": 0.92}, DELTA: {"ratio_to_peft": 0.8}}.get(spec.op, {})
    if "H200" not in torch.cuda.get_device_name():
        return {}
    if spec.op == MASKED:
        return {"ratio_to_frozen": 1.04 if mode == FORWARD else 1.03}
    if spec.layout == "block" and spec.density == 0.1 and mode == FORWARD:
        return {"ratio_to_frozen": 1 / 5}
    if spec.op == SPARSE and spec.m == 1 and spec.density in _DECODING:
        return {"ratio_to_frozen": _DECODING[spec.density]}
    return {}


def facts(peer: Peer, spec: PrunedSpec, mode: str) -> dict[str, Any]:
    """What a row needs besides what every row has: density and layout, and bars where dispatch chose."""
    rows = {"density": spec.density, "layout": spec.layout, "clean": spec.clean}
    return {**rows, "bars": bars(spec, mode)} if peer.backend == "auto" else rows


# Peers ------------------------------------------------------------------------------------------------------------


def _ours(backend: str | None, case: Case) -> Layer:
    leaves = wanted(case)
    call: Callable[[Tensor], Tensor] = lambda x: case.call({**case.tensors, **leaves, "x": x})  # noqa: E731
    return of_case(case, call, leaves, context=lambda: dispatch.use_backend(backend))


def _dense_weight(case: Case) -> Tensor:
    """W as a dense layer would have it."""
    if case.op == SPARSE:
        weight: SparseWeight = case.options["weight"]  # type: ignore[assignment]
        return weight.dense()
    weight = case.tensors["weight"]
    return weight * case.options["mask"].unpack() if case.op == MASKED else weight  # type: ignore[attr-defined]


class _Dense(Peer):
    """The dense layer: all of the gradient of W where the op gives a part of it, W alone where values are added."""

    def problem(self, spec: Spec, seed: int = 1) -> Case:
        case = spec.case(seed)
        tensors = {"x": case.tensors["x"], "weight": _dense_weight(case)}
        trains = case.op == MASKED or (case.op == SPARSE and "values" in case.grads)
        return Case(spec.op, case.label, tensors, {}, lambda t: F.linear(t["x"], t["weight"]),
                    ("x", "weight") if trains else ("x",))  # fmt: skip


def _dense(case: Case) -> Layer:
    leaves = wanted(case)
    weight = leaves.get("weight", case.tensors["weight"])
    x = leaves["x"]
    grad_y = Draw(x.device, 3)(x.dtype, x.shape[0], weight.shape[0])
    frozen = () if "weight" in leaves else (weight,)
    return Layer(lambda x: F.linear(x, weight), leaves, grad_y, frozen=frozen)


def _mask_in_each_call(case: Case) -> Layer:
    leaves, kept = wanted(case), case.options["mask"].unpack()  # type: ignore[attr-defined]
    return of_case(case, lambda x: F.linear(x, leaves["weight"] * kept), leaves)


def _shira(case: Case) -> Layer:
    """PEFT's SHiRA layer with the same chosen weights."""
    peft = importlib.import_module("peft")
    places: Positions = case.options["indices"]  # type: ignore[assignment]
    n, k = places.shape
    with torch.device("meta"):
        linear = nn.Linear(k, n, bias=False)
    linear.weight = nn.Parameter(case.tensors["weight"], requires_grad=False)
    config = peft.ShiraConfig(r=1, target_modules=["0"], init_weights=False, mask_type="random")
    layer: Any = peft.inject_adapter_in_model(config, nn.ModuleList([linear]))[0]
    values = nn.Parameter(case.tensors["values"].detach().clone())
    flat = places.flat.long()
    layer.shira_weight["default"] = values
    layer.shira_indices["default"] = torch.stack([flat // k, flat % k])
    return of_case(case, layer.train(), {"x": case.leaves()["x"], "values": values})


def _only(op: str, other: peers.Reason, why: str) -> peers.Reason:
    return lambda spec: other(spec) if spec.op == op else why


def _always(spec: Spec) -> None:
    return None


def _backend_peer(backend: str) -> Peer:
    return Peer(
        f"ours ({backend})", functools.partial(_ours, backend), functools.partial(objection, backend),
        backend=backend, accuracy=1.2,
    )  # fmt: skip


FROZEN = _Dense("frozen", _dense)
MASK = Peer("mask in each call", _mask_in_each_call, _only(MASKED, _always, "there is no mask"))
PEFT = Peer("peft", _shira, _only(DELTA, peers.installed("peft"), "PEFT's SHiRA chooses weights to train"))
AUTO = Peer("ours (auto)", functools.partial(_ours, None), backend="auto", accuracy=1.2)
BASELINES = (FROZEN, MASK, PEFT)
PEERS = (*BASELINES, AUTO, *map(_backend_peer, ("composed", "triton", "cuda", "cpu", "reference")))
