"""Peak memory of a training step of twelve transformer blocks, PEFT's layers against accelerated ones."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaModel

import peft_kernels
from tests.allocations import peak_bytes

HIDDEN, INTERMEDIATE, BLOCKS, TOKENS = 64, 160, 12, (4, 64)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def stack(dropout: float, accelerated: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    model = get_peft_model(LlamaModel(config), LoraConfig(r=4, lora_dropout=dropout, target_modules=PROJECTIONS))
    if accelerated:
        assert peft_kernels.accelerate(model).fused == BLOCKS * len(PROJECTIONS)
    return model


def peak(dropout: float, accelerated: bool) -> int:
    model = stack(dropout, accelerated)
    ids = torch.randint(0, 64, TOKENS, generator=torch.Generator().manual_seed(1))

    def step() -> None:
        model(ids).last_hidden_state.square().mean().backward()
        model.zero_grad()

    step()  # whatever is made once
    return peak_bytes(step)


@pytest.fixture(scope="module")
def peaks() -> dict[tuple[float, bool], int]:
    return {(p, ours): peak(p, ours) for p in (0.0, 0.05) for ours in (False, True)}


def test_dropout_costs_neither_masks_nor_dropped_copies(peaks):
    inputs = 3 * HIDDEN + HIDDEN + 2 * HIDDEN + INTERMEDIATE  # of q/k/v, o, gate/up and down
    tokens = TOKENS[0] * TOKENS[1]
    copies, masks = 4 * inputs * tokens * BLOCKS, inputs * tokens * BLOCKS  # float32; at least a byte a mask element
    assert peaks[0.05, False] - peaks[0.05, True] >= copies + masks


def test_dropout_costs_only_seeds(peaks):
    """Not even a share of a mask: in all twelve blocks dropout adds less than one layer's mask at a bit an element,
    besides what one block drops out while its gradients are computed."""
    tokens = TOKENS[0] * TOKENS[1]
    assert peaks[0.05, True] - peaks[0.0, True] < 4 * INTERMEDIATE * tokens + HIDDEN * tokens // 8


def test_without_dropout_less_than_peft(peaks):
    """PEFT keeps act(gate) and act(gate) * up of each block besides gate and up."""
    kept = 2 * 4 * INTERMEDIATE * TOKENS[0] * TOKENS[1]
    assert peaks[0.0, False] - peaks[0.0, True] > (BLOCKS - 2) * kept
