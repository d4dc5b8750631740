"""Peers for `nf4_linear` and `nf4_lora_linear`: dense layers, bitsandbytes, PEFT over its layers, ours, others.

Peers are called through their public functions and modules only. One that is not installed is skipped with the reason.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_kernels
from benchmarks import peers
from benchmarks.blocks import objection, of_case, wanted
from benchmarks.peers import Layer, Peer, Reason
from benchmarks.problems import Case, Spec
from peft_kernels import dispatch, functional
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.problems import SCALING

OPS = ("nf4_linear", "nf4_lora_linear")


def _weight(case: Case) -> NF4Weight:
    q = case.options["q"]
    assert isinstance(q, NF4Weight)
    return q


def _layer(case: Case, call, leaves: dict[str, Tensor], **more) -> Layer:
    layer = of_case(case, call, leaves, **more)
    return replace(layer, frozen=(*layer.frozen, *_weight(case).tensors))


def _ours(backend: str | None, case: Case) -> Layer:
    leaves = wanted(case)
    arguments = {name: leaves.get(name, tensor) for name, tensor in case.tensors.items() if name != "x"}
    op = functools.partial(getattr(functional, case.op), **arguments)
    # As in training; the gate gives a seed, to know the mask.
    drawing = {name: None if name == "seed" else value for name, value in case.options.items()}
    return _layer(
        case, functools.partial(op, **drawing), leaves,
        context=lambda: dispatch.use_backend(backend), checked=functools.partial(op, **case.options),
    )  # fmt: skip


def _frozen(case: Case) -> Layer:
    """Dense, as if the weight had never been quantised."""
    x = case.leaves()["x"]
    weight = _weight(case).dequantize(x.dtype)
    return replace(_layer(case, functools.partial(F.linear, weight=weight), {"x": x}), frozen=(weight,))


def _ours_frozen(case: Case) -> Layer:
    return _layer(case, functools.partial(functional.nf4_linear, q=_weight(case)), {"x": case.leaves()["x"]})


def _dequantised(case: Case) -> Layer:
    """All of the weight made dense by our `nf4_dequantize` in each call, then PyTorch's functions."""
    leaves, q = wanted(case), _weight(case)

    def call(x: Tensor) -> Tensor:
        y = F.linear(x, functional.nf4_dequantize(q, x.dtype))
        if case.op == "nf4_linear":
            return y
        a, b = leaves["lora_A"].to(x.dtype), leaves["lora_B"].to(x.dtype)
        dropped = F.dropout(x, case.options["dropout_p"])
        return y + SCALING * F.linear(F.linear(dropped, a), b)

    return _layer(case, call, leaves)


def _bitsandbytes(case: Case) -> Layer:
    matmul = importlib.import_module("bitsandbytes").matmul_4bit
    params = _weight(case).to_bitsandbytes()

    def call(x: Tensor) -> Tensor:
        return matmul(x, params.t(), quant_state=params.quant_state)

    return _layer(case, call, wanted(case))


def _peft_model(case: Case) -> tuple[nn.ModuleList, dict[str, Tensor]]:
    """PEFT's layer over bitsandbytes' `Linear4bit`, in training mode, and its leaves."""
    from peft import LoraConfig, inject_adapter_in_model

    q, r = _weight(case), case.tensors["lora_A"].shape[0]
    linear4bit = importlib.import_module("bitsandbytes").nn.Linear4bit
    with torch.device("meta"):
        linear = linear4bit(q.shape[1], q.shape[0], bias=False, compute_dtype=q.dtype, quant_type="nf4")
    linear.weight = q.to_bitsandbytes()
    config = LoraConfig(r=r, lora_alpha=SCALING * r, lora_dropout=case.options["dropout_p"], target_modules=["0"])
    model = inject_adapter_in_model(config, nn.ModuleList([linear]))
    leaves = {"x": case.leaves()["x"]}
    for name in ("lora_A", "lora_B"):
        leaves[name] = getattr(model[0], name)["default"].weight = nn.Parameter(case.tensors[name].detach())
    return model.train(), leaves


def _peft(case: Case) -> Layer:
    model, leaves = _peft_model(case)
    return _layer(case, model[0], leaves)


def _accelerated(case: Case) -> Layer:
    model, leaves = _peft_model(case)
    peft_kernels.accelerate(model)
    return _layer(case, model[0], leaves)


def _unsloth(case: Case) -> Layer:
    """`LoRA_W` over a 4-bit weight with its quantisation state."""
    lora_w = importlib.import_module("unsloth.kernels.fast_lora").LoRA_W
    leaves, params = wanted(case), _weight(case).to_bitsandbytes()

    def call(x: Tensor) -> Tensor:
        operands = (params, params.quant_state, leaves["lora_A"], leaves["lora_B"], SCALING)
        return lora_w.apply(x.unsqueeze(0), *operands).squeeze(0)

    return _layer(case, call, leaves)


def _only(op: str, other: Reason, why: str) -> Reason:
    return lambda spec: other(spec) if spec.op == op else why


def _over_bitsandbytes(spec: Spec) -> str | None:
    return peers.installed("bitsandbytes")(spec) or peers.installed("peft")(spec)


def _always(spec: Spec) -> None:
    return None


_NO_ADAPTER, _ADAPTER = "there is no adapter", "it has no adapters"

FROZEN = Peer("frozen", _frozen, frozen=True)
BITSANDBYTES = Peer("bitsandbytes", _bitsandbytes, _only("nf4_linear", peers.installed("bitsandbytes"), _ADAPTER))
PEFT = Peer("peft", _peft, _only("nf4_lora_linear", _over_bitsandbytes, _NO_ADAPTER))
OURS_FROZEN = Peer(
    "nf4_linear", _ours_frozen, _only("nf4_lora_linear", _always, "it is what is measured"), accuracy=1.2, frozen=True
)
AUTO = Peer("ours (auto)", functools.partial(_ours, None), backend="auto", accuracy=1.2)
BASELINES = (PEFT, BITSANDBYTES, OURS_FROZEN, FROZEN)


def _backend_peer(backend: str) -> Peer:
    return Peer(
        f"ours ({backend})", functools.partial(_ours, backend), functools.partial(objection, backend),
        backend=backend, accuracy=1.2,
    )  # fmt: skip


PEERS = (
    *BASELINES,
    Peer("dequantised", _dequantised),
    AUTO,
    *map(_backend_peer, ("composed", "triton", "cuda", "cpu", "reference")),
    Peer(
        "peft accelerated", _accelerated, _only("nf4_lora_linear", _over_bitsandbytes, _NO_ADAPTER),
        backend="auto", accuracy=1.2,
    ),
    Peer("unsloth", _unsloth, _only("nf4_lora_linear", peers.unsloth_reason, _NO_ADAPTER), patches=True),
)  # fmt: skip
