"""Every implementation of a LoRA linear layer behind one interface: ours, each backend, and what else people use.

Peers are called through their public functions only. One that is not installed is skipped with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_kernels
from benchmarks.problems import FORWARD, Case, Spec, Tensors
from benchmarks.timing import Context, Step
from peft_kernels import dispatch, functional
from peft_kernels.ops.philox_dropout import new_seed

Reason = Callable[[Spec], "str | None"]
Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Layer:
    """A peer's layer on one set of tensors.

    Attributes:
        call: maps x to y.
        leaves: x, and the tensors whose gradients the layer gives; x gets none where it does not require any.
        context: what is in force while it runs.
        drop_mask: consumes random numbers as one forward does and returns the mask that this forward would use (0 or
            1/(1-p) for each element of x); None where the peer does not tell.
        frozen: parameters without gradients.
        checked: what the gate calls instead of `call`, where that one draws a dropout mask that nobody can know.
    """

    call: Callable[[Tensor], Outputs]
    leaves: dict[str, Tensor]
    grad_y: Outputs
    context: Context = contextlib.nullcontext
    drop_mask: Callable[[], Tensor] | None = None
    frozen: tuple[Tensor, ...] = ()
    checked: Callable[[Tensor], Outputs] | None = None

    def parameters(self) -> list[Tensor]:
        """W, A and B: what is there anyway, whatever a layer keeps for backward."""
        return [*self.frozen, *(tensor for name, tensor in self.leaves.items() if name != "x")]

    def step(self, mode: str) -> Step:
        """One training step's work for this layer, without arguments."""
        x, wanted, grad_y, call = self.leaves["x"], list(self.leaves.values()), self.grad_y, self.call
        if mode == FORWARD:
            return lambda: call(x)
        return lambda: torch.autograd.grad(call(x), wanted, grad_y)

    def result(self) -> tuple[Outputs, dict[str, Tensor]]:
        with self.context():
            y = (self.checked or self.call)(self.leaves["x"])
            wanted = {name: leaf for name, leaf in self.leaves.items() if leaf.requires_grad}
            grads = torch.autograd.grad(y, list(wanted.values()), self.grad_y) if wanted else ()
        found = y.detach() if isinstance(y, Tensor) else tuple(part.detach() for part in y)
        return found, dict(zip(wanted, grads, strict=True))


@dataclass(frozen=True)
class Peer:
    """One implementation.

    Attributes:
        name: what tables call it.
        build: makes its layer from a problem: `Tensors` of `lora_linear`, a `Case` of other ops.
        unavailable: why it cannot run this problem here, or None.
        backend: ours only: the implementation's folder under `kernels/`, or "auto" for what dispatch takes.
        accuracy: how many times eager PyTorch's own error its result may have. 1.2 is this library's contract; other
            libraries may round more often.
        frozen: it computes the frozen layer without an adapter.
        patches: importing it changes other libraries, so it must run after everything else.
    """

    name: str
    build: Callable[[Any], Layer]
    unavailable: Reason = field(default=lambda spec: None)
    backend: str | None = None
    accuracy: float = 2.0
    frozen: bool = False
    patches: bool = False

    def layer(self, spec: Spec, seed: int = 1) -> Layer:
        return self.build(self.problem(spec, seed))

    def problem(self, spec: Spec, seed: int = 1) -> Any:
        """The problem that its layer solves."""
        if spec.op == "lora_linear":
            return spec.draw(seed, zero_B=self.frozen)
        return without_adapters(spec.case(seed)) if self.frozen else spec.case(seed)


def without_adapters(case: Case) -> Case:
    """The same problem with B = 0 and, of DoRA, the magnitude of W: the frozen layer's."""
    tensors = {name: torch.zeros_like(t) if name.startswith("lora_B") else t for name, t in case.tensors.items()}
    if "magnitude" in tensors:
        norm = tensors["weight"].float().norm(dim=1)
        tensors["magnitude"] = norm.to(tensors["magnitude"].dtype)
    return replace(case, tensors=tensors)


def _lora_leaves(problem: Tensors) -> dict[str, Tensor]:
    return {name: problem.tensors[name] for name in ("x", "lora_A", "lora_B")}


# Ours ------------------------------------------------------------------------------------------------------------


def _ours(backend: str | None, problem: Tensors) -> Layer:
    t, p = problem.tensors, problem.dropout_p
    leaves = _lora_leaves(problem)

    def call(x: Tensor) -> Tensor:
        return functional.lora_linear(
            x, t["weight"], leaves["lora_A"], leaves["lora_B"], scaling=problem.scaling, dropout_p=p
        )

    return Layer(
        call,
        leaves,
        problem.grad_y,
        lambda: dispatch.use_backend(backend),
        lambda: _philox_mask(t["x"], p),
        (t["weight"],),
    )


def _philox_mask(x: Tensor, p: float) -> Tensor:
    seed = new_seed(x.device)
    with dispatch.use_backend("reference"):
        return functional.philox_dropout(torch.ones_like(x, dtype=torch.float64).detach(), p, seed)


def _objection(backend: str, spec: Spec) -> str | None:
    if backend not in dispatch.ORDER["lora_linear"]:
        return f"lora_linear has no {backend} implementation"
    return dispatch.objection("lora_linear", backend, spec.dispatched(), forced=True)


def chosen_backend(spec: Spec) -> dispatch.Choice:
    """What dispatch takes for this problem, and why."""
    return dispatch.choose(spec.op, spec.dispatched())


# Hugging Face PEFT ------------------------------------------------------------------------------------------------


def installed(module: str) -> Reason:
    return lambda spec: None if importlib.util.find_spec(module) else f"{module} is not installed"


def _linear(problem: Tensors) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(problem.k, problem.n, bias=False)
    linear.weight = nn.Parameter(problem.tensors["weight"], requires_grad=False)
    return linear


def _peft_model(problem: Tensors) -> tuple[nn.Sequential, dict[str, Tensor]]:
    """A model of one PEFT LoRA layer in training mode, sharing the problem's tensors, and its leaves."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=problem.r, lora_alpha=problem.scaling * problem.r, lora_dropout=problem.dropout_p, target_modules=["0"]
    )
    model = inject_adapter_in_model(config, nn.Sequential(_linear(problem)))
    leaves = {"x": problem.tensors["x"]}
    for name in ("lora_A", "lora_B"):
        leaves[name] = nn.Parameter(problem.tensors[name].detach())
        getattr(model[0], name)["default"].weight = leaves[name]
    return model.train(), leaves


def _peft(problem: Tensors, *, autocast: bool = False) -> Layer:
    model, leaves = _peft_model(problem)
    layer = model[0]
    x = problem.tensors["x"]

    def drop_mask() -> Tensor:
        # PEFT casts x to the adapters' dtype before its dropout, unless autocast does the casting.
        ones = torch.ones_like(x, dtype=x.dtype if autocast else problem.adapter_dtype).detach()
        return layer.lora_dropout["default"](ones).double()

    def context() -> contextlib.AbstractContextManager:
        # A training step casts each adapter once; the cache would spare that to all repetitions of a measurement.
        return torch.autocast(problem.device, dtype=problem.dtype, enabled=autocast, cache_enabled=False)

    return Layer(layer, leaves, problem.grad_y, context, drop_mask, (problem.tensors["weight"],))


def _peft_autocast_reason(spec: Spec) -> str | None:
    if spec.dtype == spec.adapter_dtype:
        return "autocast changes nothing where adapters have the base's dtype"
    return installed("peft")(spec)


def _call_layer(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


@functools.cache
def compiled_call() -> Callable[[nn.Module, Tensor], Tensor]:
    # fullgraph makes running out of recompilations an error; without it the peer would be timed in eager mode.
    return torch.compile(_call_layer, fullgraph=True, dynamic=False)


def _peft_compiled(problem: Tensors) -> Layer:
    model, leaves = _peft_model(problem)
    call = functools.partial(compiled_call(), model[0])
    return Layer(call, leaves, problem.grad_y, frozen=(problem.tensors["weight"],))


def compiled_reason(spec: Spec) -> str | None:
    if spec.device == "cpu" and spec.m < 512:
        return "compiled on a GPU and for the larger CPU shapes only, to bound the time that compiling takes"
    return installed("peft")(spec)


def _accelerated(problem: Tensors) -> Layer:
    model, leaves = _peft_model(problem)
    peft_kernels.accelerate(model)
    mask = functools.partial(_philox_mask, leaves["x"], problem.dropout_p)
    return Layer(model[0], leaves, problem.grad_y, drop_mask=mask, frozen=(problem.tensors["weight"],))


def accelerated_reason(spec: Spec) -> str | None:
    if not hasattr(peft_kernels, "accelerate"):
        return "this version has no peft_kernels.accelerate"
    return installed("peft")(spec)


# Others -----------------------------------------------------------------------------------------------------------


def _frozen(problem: Tensors) -> Layer:
    weight, x = problem.tensors["weight"], problem.tensors["x"]
    ones = functools.partial(torch.ones_like, x, dtype=torch.float64)
    return Layer(lambda rows: F.linear(rows, weight), {"x": x}, problem.grad_y, drop_mask=ones, frozen=(weight,))


def _unsloth(problem: Tensors) -> Layer:
    """`LoRA_W`, the autograd Function behind Unsloth's fast o_proj; it wants [batch, sequence, features]."""
    lora_w = importlib.import_module("unsloth.kernels.fast_lora").LoRA_W
    weight, leaves = problem.tensors["weight"], _lora_leaves(problem)

    def call(x: Tensor) -> Tensor:
        y = lora_w.apply(x.unsqueeze(0), weight, None, leaves["lora_A"], leaves["lora_B"], problem.scaling)
        return y.squeeze(0)

    return Layer(call, leaves, problem.grad_y, frozen=(weight,))


def unsloth_reason(spec: Spec) -> str | None:
    if spec.device != "cuda":
        return "Unsloth needs a GPU"
    if spec.dropout_p:
        return "Unsloth's fast path needs lora_dropout = 0"
    return installed("unsloth")(spec)


def _lorafusion(problem: Tensors) -> Layer:
    """`fused_linear_lora`, whose result is only defined for x of [batch, sequence, features]."""
    fused = importlib.import_module("lorafusion.ops.lora_v1").fused_linear_lora
    weight, leaves = problem.tensors["weight"], _lora_leaves(problem)

    def call(x: Tensor) -> Tensor:
        y = fused(
            x.unsqueeze(0),
            weight,
            leaves["lora_A"],
            leaves["lora_B"],
            alpha=problem.scaling,
            dropout_p=problem.dropout_p,
        )
        return y.squeeze(0)

    return Layer(call, leaves, problem.grad_y, frozen=(weight,))


def _lorafusion_reason(spec: Spec) -> str | None:
    if spec.device != "cuda":
        return "LoRAFusion needs a GPU"
    if spec.dtype != spec.adapter_dtype:
        return "LoRAFusion needs adapters of the base's dtype"
    if spec.r & (spec.r - 1):
        return "LoRAFusion needs a rank that is a power of two"
    return installed("lorafusion")(spec)


FROZEN = Peer("frozen", _frozen, frozen=True)
PEFT = Peer("peft", _peft, installed("peft"))
AUTO = Peer("ours (auto)", functools.partial(_ours, None), backend="auto", accuracy=1.2)
BASELINES = (PEFT, FROZEN)  # what every row is compared with


def _backend_peer(backend: str) -> Peer:
    return Peer(
        f"ours ({backend})", functools.partial(_ours, backend), functools.partial(_objection, backend),
        backend=backend, accuracy=1.2,
    )  # fmt: skip


PEERS = (
    FROZEN,
    PEFT,
    Peer("peft autocast", functools.partial(_peft, autocast=True), _peft_autocast_reason),
    Peer("peft compiled", _peft_compiled, compiled_reason),
    AUTO,
    *map(_backend_peer, ("composed", "triton", "cuda", "cpu", "reference")),
    Peer("peft accelerated", _accelerated, accelerated_reason, backend="auto", accuracy=1.2),
    Peer("unsloth", _unsloth, unsloth_reason, patches=True),
    Peer("lorafusion", _lorafusion, _lorafusion_reason, patches=True),
)


def by_name(name: str) -> Peer:
    return next(peer for peer in PEERS if peer.name == name)
