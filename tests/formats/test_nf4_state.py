"""The entries of checkpoints: bitsandbytes' keys and bytes, with and without files, with and without bitsandbytes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_kernels.formats import nf4
from peft_kernels.formats.nf4 import BLOCKSIZES, STATE_SUFFIXES
from tests.formats.nf4_bytes import BF16, F16, F32, QUANT_STATE, equal, facts_of, same_weight, weight_of, with_facts

STORAGES = pytest.mark.parametrize("storage", [torch.uint8, BF16, F16, F32], ids=str)
NESTED = pytest.mark.parametrize("nested", [False, True])


@NESTED
def test_keys(nested):
    q = nf4.quantize(weight_of(20, 64, dtype=BF16), 32, nested)
    state = nf4.to_state(q, "layers.0.proj.weight")
    suffixes = [suffix for suffix in STATE_SUFFIXES if nested or not suffix.startswith("nested_")]
    assert list(state) == ["layers.0.proj.weight", *(f"layers.0.proj.weight.{suffix}" for suffix in suffixes)]
    facts = {"quant_type": "nf4", "blocksize": 32, "dtype": "bfloat16", "shape": [20, 64]}
    if nested:
        facts |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": q.nested_offset.item()}
    read = facts_of(state, f"layers.0.proj.{QUANT_STATE}")
    assert list(read.items()) == list(facts.items())


@STORAGES
@NESTED
def test_bytes_of_bitsandbytes(nested, storage):
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'peft-kernels[bnb]'")
    for dtype in (F32, F16, BF16):
        for blocksize in BLOCKSIZES:
            weight = weight_of(12, 96, dtype=dtype)
            packed, state = bnb.functional.quantize_4bit(
                weight, blocksize=blocksize, compress_statistics=nested, quant_type="nf4", quant_storage=storage
            )
            theirs = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()} | {"weight": packed}
            q = nf4.quantize(weight, blocksize, nested)
            ours = nf4.to_state(q, quant_storage=storage)
            assert ours.keys() == theirs.keys()
            assert all(equal(ours[key], theirs[key]) for key in ours), (dtype, blocksize)
            assert same_weight(nf4.from_state(theirs), q)
            assert bnb.functional.QuantState.from_dict(
                {key: value for key, value in ours.items() if key != "weight"}, torch.device("cpu")
            ) == state  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (5, 96), (3, 65), (2, 5, 7), (0, 64), (64, 0)], ids=str)
@NESTED
def test_round_trips(nested, shape):
    for blocksize in (32, 64, 4096):
        for dtype in (F32, F16, BF16):
            q = nf4.quantize(weight_of(*shape, dtype=dtype), blocksize, nested)
            state = nf4.to_state(q, "a.b")
            read = nf4.from_state(state, "a.b")
            assert same_weight(read, q)
            again = nf4.to_state(read, "a.b")
            assert all(equal(again[key], state[key]) for key in state)


@STORAGES
@NESTED
def test_memory_is_shared(nested, storage):
    q = nf4.quantize(weight_of(12, 64), 64, nested)
    state = nf4.to_state(q, quant_storage=storage)
    assert state["weight"].dtype == storage
    assert state["weight"].shape == (384 // storage.itemsize, 1)
    read = nf4.from_state(state)
    assert read.packed.data_ptr() == q.packed.data_ptr()
    assert read.absmax.data_ptr() == q.absmax.data_ptr()
    assert same_weight(read, q)


def test_tables_are_not_shared():
    """safetensors refuses to write tensors that share memory, and a read table may belong to all weights of a model."""
    q = nf4.quantize(weight_of(12, 64))
    one, two = nf4.to_state(q, "one"), nf4.to_state(q, "two")
    for suffix in ("quant_map", "nested_quant_map"):
        assert one[f"one.{suffix}"].data_ptr() != two[f"two.{suffix}"].data_ptr()


@STORAGES
def test_through_a_file(tmp_path, storage):
    weights = {f"layers.{i}.weight": nf4.quantize(weight_of(6, 64, seed=i), 64, i % 2 == 0) for i in range(3)}
    entries: dict[str, torch.Tensor] = {"norm.weight": torch.ones(3)}
    for name, q in weights.items():
        entries |= nf4.to_state(q, name, storage)
    save_file(entries, tmp_path / "model.safetensors")
    read = load_file(tmp_path / "model.safetensors")
    for name, q in weights.items():
        assert same_weight(nf4.from_state(read, name), q)


@pytest.mark.parametrize("offset", [0.1, 1e-45, 1.17549435e-38, 3.4028234663852886e38, -2.5, 0.0, 2**-149 * 12345])
def test_the_offset_survives_exactly(offset):
    q = nf4.quantize(weight_of(6, 64))._replace(nested_offset=torch.tensor(offset))
    assert equal(nf4.from_state(nf4.to_state(q)).nested_offset, q.nested_offset)


def test_values_that_other_writers_choose():
    """Whole numbers for the offset, other shapes of the entries, keys in another order, parameters."""
    q = nf4.quantize(weight_of(6, 64))._replace(nested_offset=torch.tensor(2.0))
    state = dict(reversed(nf4.to_state(q).items()))
    assert same_weight(nf4.from_state(with_facts(state, nested_offset=2)), q)
    for shape in ((-1,), (1, -1), (2, -1)):
        assert same_weight(nf4.from_state({**state, "weight": state["weight"].reshape(shape)}), q)
    parameter = torch.nn.Parameter(state["weight"], requires_grad=False)
    read = nf4.from_state({**state, "weight": parameter})
    assert same_weight(read, q)
    assert type(read.packed) is torch.Tensor
    spread = torch.empty(192, 2, dtype=torch.uint8)
    spread[:, :1] = state["weight"]
    assert same_weight(nf4.from_state({**state, "weight": spread[:, :1]}), q)


def test_neighbours_in_a_checkpoint_do_not_matter():
    q = nf4.quantize(weight_of(6, 64))
    state = {
        **nf4.to_state(q, "a.weight"),
        "a.weight2": torch.ones(1),
        "a.bias": torch.ones(1),
        "weight": torch.ones(1),
    }
    assert same_weight(nf4.from_state(state, "a.weight"), q)


def test_on_meta_only_the_description_is_read():
    q = nf4.quantize(weight_of(6, 64))
    state = {key: t if key == QUANT_STATE else t.to("meta") for key, t in nf4.to_state(q).items()}
    read = nf4.from_state(state)
    assert (read.layout, read.shape, read.dtype) == (q.layout, q.shape, q.dtype)
    assert all(tensor.is_meta for tensor in read.tensors)


def test_only_whole_weights_have_a_state():
    q = nf4.quantize(weight_of(2, 6, 33), 32)
    for part in (q.expert(0), q.rows(1, 12), q.rows(0, 11), q.expert(0).columns(0, 32)):
        with pytest.raises(ValueError, match="is a view of a larger one; only a whole weight has a state"):
            nf4.to_state(part)
    with pytest.raises(TypeError, match=r"q.dtype is torch.float64; expected torch.float32, torch.float16, torch.bf"):
        nf4.to_state(nf4.quantize(weight_of(4, 4))._replace(dtype=torch.float64))
    with pytest.raises(TypeError, match=r"quant_storage is torch.float64; expected torch.uint8, torch.bf"):
        nf4.to_state(q, quant_storage=torch.float64)
