"""Models on bitsandbytes' linear layers, quantised on the CPU, and what they compute, in dense layers."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_kernels import restore
from peft_kernels.formats.nf4 import CODE
from tests.integrations import models
from tests.integrations.models import Toy, adapted

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'peft-kernels[bnb]'")


def quantised(linear: nn.Linear, *, compute=torch.float32, nested=True, kind="nf4", **options) -> nn.Module:
    """A `Linear4bit` with the layer's numbers. `compute=None` leaves the compute dtype to the first call."""
    n, k = linear.out_features, linear.in_features
    options = {"compute_dtype": compute, "compress_statistics": nested, "quant_type": kind, **options}
    layer = bnb.nn.Linear4bit(k, n, bias=linear.bias is not None, **options)
    layer.load_state_dict(linear.state_dict())
    layer.requires_grad_(False)
    return layer.to("cpu")


def quantise(model: nn.Module, **options) -> nn.Module:
    """Every linear layer but the head."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, quantised(module, **options))
    model.is_loaded_in_4bit = True  # what makes PEFT choose its class for such layers
    return model


def toy(k: int = 64, n: int = 64, *, adapter: dict | None = None, **options) -> nn.Module:
    torch.manual_seed(0)
    return adapted(quantise(Toy(k, n), **options), target_modules=["first", "second"], **(adapter or {}))


def llama(*, adapter=None, dtype: torch.dtype = torch.float32, prepared: bool = False, **options) -> nn.Module:
    """Every K a multiple of 64, where bitsandbytes is right on any CPU. `prepared`: for training, by PEFT."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=models.VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    model = quantise(LlamaForCausalLM(config).to(dtype), **options)
    if prepared:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    return adapted(model, target_modules=models.TARGETS[models.llama], **(adapter or {}))


def formula(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight of a `Linear4bit`, by the definition of NF4 and nothing else."""
    state = layer.weight.quant_state
    packed = layer.weight.data.view(torch.uint8).flatten().long()
    absmax = state.absmax
    if state.nested:
        scales = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: absmax.numel()]
        absmax = state.state2.code[absmax.long()] * scales + state.offset
    indices = torch.stack((packed >> 4, packed & 15), 1).flatten()[: state.shape.numel()]
    scales = absmax.repeat_interleave(state.blocksize)[: indices.numel()]
    return (torch.tensor(CODE)[indices] * scales).view(state.shape).to(dtype)


def dense(model: nn.Module, weights: torch.dtype = torch.float32) -> nn.Module:
    """A copy of PEFT's own code over dense layers, with weights rounded once to `weights`."""
    copied = copy.deepcopy(model)
    restore(copied)
    for name, module in list(copied.named_modules()):
        if type(module) is bnb.nn.Linear4bit:
            n, k = module.weight.quant_state.shape
            linear = nn.Linear(k, n, bias=module.bias is not None).requires_grad_(False)
            linear.weight.data = formula(module, weights).float()
            if module.bias is not None:
                linear.bias.data = module.bias.data.float()
            copied.set_submodule(name, linear)
    return copied
