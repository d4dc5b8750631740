"""Peers for `dora_linear`, `lora_linear_group` (q, k, v) and `lora_swiglu_mlp`: the frozen layers, PEFT, ours, others.

Peers are called through their public functions and modules only. One that is not installed is skipped with the reason.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_kernels
from benchmarks import peers
from benchmarks.peers import Layer, Outputs, Peer
from benchmarks.problems import Case, Spec
from peft_kernels import dispatch, functional
from peft_kernels.problems import SCALING, nested

OPS = ("dora_linear", "lora_linear_group", "lora_swiglu_mlp")
Linear = Callable[[Tensor], Tensor]


def combine(op: str, layers: Sequence[Linear], x: Tensor) -> Outputs:
    """What a model does with the layers of the op."""
    if op == "lora_swiglu_mlp":
        gate, up, down = layers
        return down(F.silu(gate(x)) * up(x))
    ys = tuple(layer(x) for layer in layers)
    return ys if op == "lora_linear_group" else ys[0]


def matrices(case: Case, name: str) -> list[Tensor]:
    """The case's tensors of a name, one for each layer: `lora_A`, or `lora_As.0`, `lora_As.1` ..."""
    value = nested(case.tensors).get(f"{name}s", case.tensors.get(name))
    return value if isinstance(value, list) else [value]


def of_case(case: Case, call: Callable[[Tensor], Outputs], leaves: dict[str, Tensor], **more) -> Layer:
    """The layer that computes `call`, with drawn gradients of its outputs."""
    generator = torch.Generator(leaves["x"].device).manual_seed(3)
    grads = tuple(
        torch.randn(y.shape, generator=generator, device=y.device, dtype=torch.float32).to(y.dtype)
        for y in case.outputs(case.tensors)
    )
    frozen = tuple(tensor for name, tensor in case.tensors.items() if name not in case.grads)
    return Layer(call, leaves, grads if len(grads) > 1 else grads[0], frozen=frozen, **more)


def wanted(case: Case) -> dict[str, Tensor]:
    """Those of the case's tensors that get gradients, as leaves."""
    leaves = case.leaves()
    return {name: leaves[name] for name in case.grads}


def _ours(backend: str | None, case: Case) -> Layer:
    leaves = wanted(case)
    arguments = nested({name: leaves.get(name, tensor) for name, tensor in case.tensors.items() if name != "x"})
    op = getattr(functional, case.op)
    drawing = {**arguments, **case.options, "seed": None}  # as in training; the gate gives a seed, to know the mask
    return of_case(
        case, functools.partial(op, **drawing), leaves,
        context=lambda: dispatch.use_backend(backend), checked=functools.partial(op, **arguments, **case.options),
    )  # fmt: skip


def _ours_separate(case: Case) -> Layer:
    """Our `lora_linear` for each projection by itself."""
    leaves = wanted(case)
    parts = zip(matrices(case, "weight"), _of(leaves, "lora_A"), _of(leaves, "lora_B"), strict=True)
    options = {"scaling": SCALING, "dropout_p": case.options["dropout_p"]}

    def layer(weight: Tensor, a: Tensor, b: Tensor) -> Linear:
        return lambda x: functional.lora_linear(x, weight, a, b, **options)

    layers = [layer(*part) for part in parts]
    if case.op == "lora_linear_group":
        return of_case(case, functools.partial(combine, case.op, layers), leaves)
    gate, up, down = layers
    return of_case(case, lambda x: down(functional.gated_activation(gate(x), up(x))), leaves)


def _of(leaves: dict[str, Tensor], name: str) -> list[Tensor]:
    return nested({key: leaf for key, leaf in leaves.items() if key.startswith(name)})[f"{name}s"]


def objection(backend: str, spec: Spec) -> str | None:
    if backend not in dispatch.ORDER[spec.op]:
        return f"{spec.op} has no {backend} implementation"
    return dispatch.objection(spec.op, backend, spec.dispatched(), forced=True)


class PeftBlock(nn.Module):
    """PEFT's layers for an op, in training mode, sharing the case's tensors."""

    def __init__(self, case: Case) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        super().__init__()
        self.op = case.op
        weights, As = matrices(case, "weight"), matrices(case, "lora_A")
        layers = nn.ModuleList(frozen_linear(weight) for weight in weights)
        config = LoraConfig(
            r=As[0].shape[0], lora_alpha=SCALING * As[0].shape[0], lora_dropout=case.options["dropout_p"],
            target_modules=[str(i) for i in range(len(weights))], use_dora=case.op == "dora_linear",
        )  # fmt: skip
        self.layers = inject_adapter_in_model(config, layers)
        self.leaves = {"x": case.leaves()["x"]}
        for name in ("lora_A", "lora_B"):
            for i, (layer, values) in enumerate(zip(self.layers, matrices(case, name), strict=True)):
                key = f"{name}s.{i}" if f"{name}s.0" in case.tensors else name
                self.leaves[key] = getattr(layer, name)["default"].weight = nn.Parameter(values.detach())
        if self.op == "dora_linear":
            magnitude = nn.Parameter(case.tensors["magnitude"].detach())
            self.leaves["magnitude"] = self.layers[0].lora_magnitude_vector["default"].weight = magnitude
        self.leaves = {name: self.leaves[name] for name in case.grads}
        self.train()

    def forward(self, x: Tensor) -> Outputs:
        return combine(self.op, list(self.layers), x)


def frozen_linear(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _peft(case: Case) -> Layer:
    block = PeftBlock(case)
    return of_case(case, block, block.leaves)


def _accelerated(case: Case) -> Layer:
    block = PeftBlock(case)
    peft_kernels.accelerate(block)
    return of_case(case, block, block.leaves)


def _compiled(case: Case) -> Layer:
    block = PeftBlock(case)
    return of_case(case, functools.partial(peers.compiled_call(), block), block.leaves)


def _compiled_reason(spec: Spec) -> str | None:
    if spec.device == "cpu":
        return "compiled on a GPU only, to bound the time that compiling takes"
    return peers.installed("peft")(spec)


def _frozen(case: Case) -> Layer:
    layers = [functools.partial(F.linear, weight=weight) for weight in matrices(case, "weight")]
    return of_case(case, functools.partial(combine, case.op, layers), {"x": case.leaves()["x"]})


def _unsloth(case: Case) -> Layer:
    """`LoRA_QKV` and `LoRA_MLP`, the autograd Functions behind Unsloth's fast attention and MLP."""
    fast = importlib.import_module("unsloth.kernels.fast_lora")
    leaves = wanted(case)
    parts = zip(matrices(case, "weight"), _of(leaves, "lora_A"), _of(leaves, "lora_B"), strict=True)
    operands = [operand for weight, a, b in parts for operand in (weight, None, a, b, SCALING)]
    if case.op == "lora_linear_group":

        def call(x: Tensor) -> Outputs:
            return tuple(y.squeeze(0) for y in fast.LoRA_QKV.apply(x.unsqueeze(0), *operands, False))
    else:
        kernels = (fast.swiglu_fg_kernel, fast.swiglu_DWf_DW_dfg_kernel)

        def call(x: Tensor) -> Outputs:
            return fast.LoRA_MLP.apply(x.unsqueeze(0), *operands, *kernels, False).squeeze(0)

    return of_case(case, call, leaves)


def _unsloth_reason(spec: Spec) -> str | None:
    if spec.op == "dora_linear":
        return "Unsloth's fast path has no DoRA"
    return peers.unsloth_reason(spec)


def _liger(case: Case) -> Layer:
    """PEFT's layers around Liger's SwiGLU."""
    block = PeftBlock(case)
    swiglu = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    gate, up, down = block.layers
    return of_case(case, lambda x: down(swiglu.apply(gate(x), up(x))), block.leaves)


def _liger_reason(spec: Spec) -> str | None:
    if spec.op != "lora_swiglu_mlp":
        return "Liger-Kernel has no LoRA kernel; its SwiGLU is for the MLP"
    if spec.device != "cuda":
        return "Liger-Kernel needs a GPU"
    return peers.installed("liger_kernel")(spec)


def _separate_reason(spec: Spec) -> str | None:
    return "one layer only" if spec.op == "dora_linear" else None


FROZEN = Peer("frozen", _frozen, frozen=True)
PEFT = Peer("peft", _peft, peers.installed("peft"))
AUTO = Peer("ours (auto)", functools.partial(_ours, None), backend="auto", accuracy=1.2)
BASELINES = (PEFT, FROZEN)


def _backend_peer(backend: str) -> Peer:
    return Peer(
        f"ours ({backend})", functools.partial(_ours, backend), functools.partial(objection, backend),
        backend=backend, accuracy=1.2,
    )  # fmt: skip


PEERS = (
    FROZEN,
    PEFT,
    Peer("peft compiled", _compiled, _compiled_reason),
    AUTO,
    *map(_backend_peer, ("composed", "triton", "cuda", "cpu", "reference")),
    Peer("ours, one by one", _ours_separate, _separate_reason, accuracy=1.2),
    Peer("peft accelerated", _accelerated, peers.accelerated_reason, backend="auto", accuracy=1.2),
    Peer("peft with liger", _liger, _liger_reason, patches=True),
    Peer("unsloth", _unsloth, _unsloth_reason, patches=True),
)
