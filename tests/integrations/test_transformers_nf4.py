"""Checkpoints of models in 4 bits, from transformers to here and back, on a tiny Llama: the same bits and logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_kernels import quantize_linears
from peft_kernels.formats import nf4
from tests.formats.nf4_bytes import BF16, equal, same_weight

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'peft-kernels[bnb]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'peft-kernels[peft]'")

# Every K is a multiple of 64: bitsandbytes' forward is right there on every CPU.
CONFIG = transformers.LlamaConfig(
    vocab_size=48, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, use_cache=False,
)  # fmt: skip
IDS = torch.arange(20).view(2, 10)
KINDS = pytest.mark.parametrize(
    ("nested", "storage"), [(False, torch.uint8), (True, torch.uint8), (True, BF16)], ids=str, scope="module"
)


def load(folder: Path, **options) -> nn.Module:
    # In training mode, in which bitsandbytes keeps the weights as they are on a CPU with AVX-512 too.
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=BF16, **options).train()


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A model of random weights in bfloat16, saved by transformers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense")
    transformers.LlamaForCausalLM(CONFIG).to(BF16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(dense, nested, storage, tmp_path_factory) -> tuple[nn.Module, Path]:
    """The model that transformers quantised, and where it saved it."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype=BF16,
        bnb_4bit_quant_storage=storage,
    )  # fmt: skip
    model = load(dense, quantization_config=config)
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    return model, folder


def quantised_layers(model: nn.Module) -> dict[str, nn.Module]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, bnb.nn.Linear4bit)}
    assert len(layers) == 14
    return layers


def entries_of(model: nn.Module, storage: torch.dtype, nested: bool) -> dict[str, Tensor]:
    """What a dense model's checkpoint holds once the layers that transformers quantises are in 4 bits."""
    entries: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("_proj.weight"):
            entries |= nf4.to_state(nf4.quantize(tensor, 64, nested), name, storage)
        else:
            entries[name] = tensor.clone()
    return entries


@KINDS
def test_what_transformers_saved_loads_weight_by_weight(theirs, dense, nested, storage):
    """The same bits as its model has in memory, and as the dense weights quantised here."""
    model, folder = theirs
    saved, weights = load_file(folder / "model.safetensors"), load_file(dense / "model.safetensors")
    for name, layer in quantised_layers(model).items():
        q = nf4.from_state(saved, f"{name}.weight")
        assert saved[f"{name}.weight"].dtype == storage
        assert same_weight(q, nf4.from_bitsandbytes(layer))
        assert same_weight(q, nf4.quantize(weights[f"{name}.weight"], 64, nested))
        assert equal(q.dequantize(), bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))


@KINDS
def test_what_is_written_here_is_the_same_file(theirs, dense, nested, storage):
    _, folder = theirs
    saved, ours = load_file(folder / "model.safetensors"), entries_of(load(dense), storage, nested)
    assert saved.keys() == ours.keys()
    assert all(equal(saved[name], ours[name]) for name in saved)


@KINDS
def test_what_is_written_here_loads_in_transformers(theirs, dense, nested, storage, tmp_path):
    """Model and logits are those of what transformers quantised itself, bit by bit."""
    model, _ = theirs
    save_file(entries_of(load(dense), storage, nested), tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested, "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": str(storage).removeprefix("torch."),
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load(tmp_path)
    for name, layer in quantised_layers(loaded).items():
        assert same_weight(nf4.from_bitsandbytes(layer), nf4.from_bitsandbytes(model.get_submodule(name)))
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@KINDS
def test_models_of_modules(theirs, dense, nested, storage, tmp_path):
    """A model on `NF4Linear` loads the file of transformers with strict=True, computes what it computes, and is saved
    as what transformers loads."""
    model, folder = theirs
    ours = load(dense)
    quantize_linears(ours, double_quant=not nested)
    ours.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, model(IDS).logits, rtol=0.03, atol=0.03)
    exact = transformers.LlamaForCausalLM(CONFIG)
    exact.load_state_dict({
        name: nf4.from_state(ours.state_dict(), name).dequantize() if name.endswith("_proj.weight") else tensor
        for name, tensor in ours.state_dict().items() if name.endswith(".weight")
    })  # fmt: skip
    with torch.no_grad():
        truth = exact.double()(IDS).logits
        errors = [float((m(IDS).logits.double() - truth).norm() / truth.norm()) for m in (ours, model)]
    assert errors[0] <= 1.2 * errors[1]
    save_file(ours.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(IDS).logits, model(IDS).logits)
