"""Small models with real structure, from configurations: nothing is downloaded."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import relative_error

IDS = torch.arange(14).reshape(2, 7)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=20,
        max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.3,  # so that an adapted query shows in the output
    )  # fmt: skip
    return transformers.BertModel(config).eval()


def gpt2() -> nn.Module:
    """GPT-2 with a language-model head that is tied to the embedding; its linear layers are `Conv1D`."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=8, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS)[0]


def disturb(model: nn.Module) -> None:
    """Gives every adapter a B that is not zero, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def assert_frozen(layer: nn.Module, x: Tensor, y: Tensor) -> None:
    """y, the output of an adapted layer, is the frozen one's: to the rounding of one matmul, whose sums may run in
    another order than PyTorch's, and without a trace of the update: other values of A change no bit."""
    bias = None if layer.bias is None else layer.bias.double()
    assert relative_error(y, F.linear(x.double(), layer.weight.double(), bias)) < torch.finfo(y.dtype).eps
    values = layer.lora_A.detach().clone()
    with torch.no_grad():
        layer.lora_A.mul_(-3)
        assert torch.equal(layer(x), y)
        layer.lora_A.copy_(values)


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Remembers everything about a model; the result asserts that nothing has changed."""
    values = copy.deepcopy(model.state_dict())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modules = dict(model.named_modules(remove_duplicate=False))
    scalings = {name: getattr(module, "scaling", None) for name, module in modules.items()}

    def assert_unchanged() -> None:
        now = model.state_dict()
        assert now.keys() == values.keys()
        for name, value in values.items():
            assert torch.equal(now[name], value), name
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        present = dict(model.named_modules(remove_duplicate=False))
        assert present.keys() == modules.keys()
        assert all(present[name] is module for name, module in modules.items())
        assert {name: getattr(module, "scaling", None) for name, module in present.items()} == scalings

    return assert_unchanged
