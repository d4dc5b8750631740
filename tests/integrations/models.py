"""Tiny PEFT models from configurations, without downloads, and how to compare two of them."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCABULARY = 61


def llama() -> nn.Module:
    """Grouped-query attention: k and v are narrower than q."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_cache=False,
        )
    )


def gpt2() -> nn.Module:
    """Conv1D layers, whose weights are [in, out]; the head is tied to the embedding."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=16,
            use_cache=False,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=3,
        )
    )


TARGETS = {
    llama: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    gpt2: ["c_attn", "c_proj", "c_fc"],
    bert: ["query", "key", "value", "dense"],
}


class Toy(nn.Module):
    """Two linear layers, `first` and `second`, and a convolution."""

    def __init__(self, k: int = 24, n: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(k, n)
        self.second = nn.Linear(n, n, bias=False)
        self.conv = nn.Conv1d(n, n, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def randomise(model: nn.Module) -> nn.Module:
    """Gives lora_B values other than zero, so that the adapters count."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            values = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
            parameter.data.copy_(values)
    return model


def adapted(base: nn.Module, *, dtype: torch.dtype | None = None, **config) -> PeftModel:
    """`base` with a LoRA adapter whose update is not zero."""
    torch.manual_seed(3)
    config = {"r": 4, "lora_alpha": 8, **config}
    return randomise(get_peft_model(base if dtype is None else base.to(dtype), LoraConfig(**config)))


def toy(**config) -> PeftModel:
    torch.manual_seed(0)
    return adapted(Toy(), target_modules=config.pop("target_modules", ["first", "second"]), **config)


def transformer(make, **config) -> PeftModel:
    torch.manual_seed(0)
    return adapted(make(), target_modules=config.pop("target_modules", TARGETS[make]), **config)


def tokens(model: nn.Module, rows: int = 2, length: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(5))
    labels = ids[:, 0] % 3 if "SequenceClassification" in type(model.get_base_model()).__name__ else ids
    return {"input_ids": ids, "labels": labels}


def features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = shape or (5, 24)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11)).to(dtype).requires_grad_()


def gradients(model: nn.Module, batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss (or output) and the gradients of all that require them, in a copy-free way."""
    output = model(**batch) if isinstance(batch, dict) else model(batch)
    output = getattr(output, "loss", output)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(13), dtype=torch.float64)
    leaves = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if isinstance(batch, Tensor) and batch.requires_grad:
        leaves["x"] = batch
    grads = torch.autograd.grad((output * weights.to(output.dtype)).sum(), list(leaves.values()), allow_unused=True)
    return output.detach(), {n: g for n, g in zip(leaves, grads, strict=True) if g is not None}


def twin(model: nn.Module) -> nn.Module:
    """A copy that runs PEFT's own code."""
    from peft_kernels import restore

    copied = copy.deepcopy(model)
    restore(copied)
    return copied


# Two float32 results may differ by some hundred roundings through a model; in float64 the formula itself is compared.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-11}


def assert_close(model: nn.Module, stock: nn.Module, batch) -> None:
    """Outputs and every gradient of two models are equal up to rounding: relative Frobenius error, per tensor."""
    (value, grads), (expected, expected_grads) = gradients(model, batch), gradients(stock, batch)
    assert grads.keys() == expected_grads.keys()
    assert any("lora_A" in name for name in grads)
    for name, tensor, truth in [("output", value, expected)] + [(n, grads[n], expected_grads[n]) for n in grads]:
        assert tensor.dtype == truth.dtype, name
        assert tensor.shape == truth.shape, name
        norm = float(truth.double().norm())
        assert norm > 0, name
        error = float((tensor.double() - truth.double()).norm()) / norm
        assert error <= TOLERANCES[value.dtype], f"{name}: {error:.2e}"
