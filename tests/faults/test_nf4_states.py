"""States of 4-bit weights that are corrupt, cut short or of another format, and weights of 2^31 elements and more."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

from peft_kernels import NF4Linear
from peft_kernels.formats import nf4
from peft_kernels.formats.nf4 import NF4Weight, from_state
from peft_kernels.kernels.reference import nf4_dequantize as reference
from tests.formats.nf4_bytes import BF16, F16, F32, QUANT_STATE, state_of, with_facts, with_text
from tests.problems.nf4 import huge_weight, zeros_without_memory

NAN, INF = float("nan"), float("inf")
Q = nf4.quantize(torch.randn(40, 33, generator=torch.Generator().manual_seed(0)), 32)
PLAIN = nf4.quantize(torch.randn(40, 33, generator=torch.Generator().manual_seed(0)), 32, False)
SIZES = "expected one of 32, 64, 128, 256, 512, 1024, 2048, 4096"


def entry(key: str, change: Any, q: NF4Weight = Q) -> dict[str, torch.Tensor]:
    """A state with one entry changed by a function, or taken out (None)."""
    state = state_of(q)
    value = state.pop(key)
    return state if change is None else {**state, key: change(value)}


def facts(q: NF4Weight = Q, **changes: Any) -> dict[str, torch.Tensor]:
    return with_facts(state_of(q), **changes)


def text(change: Any) -> dict[str, torch.Tensor]:
    state = state_of(Q)
    return with_text(state, change(bytes(state[QUANT_STATE].tolist())))


def put(place: Any, value: float) -> Any:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[place] = value
        return tensor

    return change


def without_nested(*names: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in state_of(Q).items() if key.removeprefix("weight.") not in names}


NESTED = ("nested_absmax", "nested_quant_map")
NO_FACTS = {"nested_blocksize": ..., "nested_dtype": ..., "nested_offset": ...}
A, M, NA, NM = "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"
# (what is wrong, the state, the key that the message begins with, what else it says)
CORRUPT = [
    ("no weight", entry("weight", None), "weight", "is missing"),
    ("no absmax", entry(A, None), A, "is missing"),
    ("no quant_map", entry(M, None), M, "is missing"),
    ("no description", entry(QUANT_STATE, None), QUANT_STATE, "is missing"),
    ("no tensor", entry(A, lambda t: t.tolist()), A, "is list; expected a tensor"),
    ("unknown entry", {**state_of(Q), "weight.scb": torch.ones(1)}, "weight.scb", "is no part of a weight in NF4"),
    ("fp4", {k.replace("__nf4", "__fp4"): t for k, t in state_of(Q).items()}, "weight.quant_state.bitsandbytes__fp4",
     "is no part of a weight in NF4; expected weight, weight.absmax"),
    # packed
    ("packed cut short", entry("weight", lambda t: t[:-1]), "weight", "has 659 bytes; expected 660"),
    ("packed too long", entry("weight", lambda t: torch.cat((t, t))), "weight", "has 1320 bytes; expected 660"),
    ("packed cast", entry("weight", lambda t: t.half()), "weight", "has 1320 bytes; expected 660"),
    ("packed int8", entry("weight", lambda t: t.view(torch.int8)), "weight", "has dtype torch.int8; expected one of"),
    ("packed float64", entry("weight", lambda t: t.double()), "weight", "has dtype torch.float64"),
    ("dense in its place", entry("weight", lambda t: torch.zeros(40, 33)), "weight", "has 5280 bytes; expected 660"),
    # absmax
    ("absmax cut short", entry(A, lambda t: t[:-1]), A, "has 41 elements; expected 42"),
    ("plain absmax cut short", entry(A, lambda t: t[:-1], PLAIN), A, "has 41 elements; expected 42"),
    ("plain absmax NaN", entry(A, put(3, NAN), PLAIN), A, "has entries that are negative or not finite"),
    ("plain absmax infinite", entry(A, put(3, INF), PLAIN), A, "has entries that are negative or not finite"),
    ("plain absmax negative", entry(A, put(-1, -1e-9), PLAIN), A, "has entries that are negative or not finite"),
    ("plain absmax half", entry(A, lambda t: t.half(), PLAIN), A, "has dtype torch.float16; expected torch.float32"),
    ("absmax float", entry(A, lambda t: t.float()), A, "has dtype torch.float32; expected torch.uint8"),
    ("absmax int64", entry(A, lambda t: t.long()), A, "has dtype torch.int64; expected torch.uint8"),
    ("absmax elsewhere", entry(A, lambda t: t.to("meta")), A, "is on meta, but weight is on cpu; expected one device"),
    # the table
    ("table of FP4", entry(M, lambda t: t.flip(0)), M, "is not the table of NF4"),
    ("table rounded", entry(M, lambda t: t.bfloat16().float()), M, "is not the table of NF4"),
    ("table NaN", entry(M, put(2, NAN)), M, "is not the table of NF4"),
    ("table short", entry(M, lambda t: t[:8]), M, "has 8 elements; expected 16"),
    ("table half", entry(M, lambda t: t.half()), M, "has dtype torch.float16; expected torch.float32"),
    # double quantisation
    ("nested_absmax cut short", entry(NA, lambda t: t[:0]), NA, "has 0 elements; expected 1"),
    ("nested_absmax NaN", entry(NA, put(0, NAN)), NA, "has entries that are negative or not finite"),
    ("nested_absmax infinite", entry(NA, put(0, INF)), NA, "has entries that are negative or not finite"),
    ("nested_absmax negative", entry(NA, put(0, -0.5)), NA, "has entries that are negative or not finite"),
    ("nested_absmax half", entry(NA, lambda t: t.bfloat16()), NA, "has dtype torch.bfloat16; expected torch.float32"),
    ("nested map cut short", entry(NM, lambda t: t[:255]), NM, "has 255 elements; expected 256"),
    ("nested map NaN", entry(NM, put(7, NAN)), NM, "has entries that are not finite"),
    ("nested map infinite", entry(NM, put(7, -INF)), NM, "has entries that are not finite"),
    ("no nested_absmax", entry(NA, None), NA, "is missing"),
    ("no nested map", entry(NM, None), NM, "is missing"),
    ("nested only described", without_nested(*NESTED), NA, "is missing"),
    ("nested not described", facts(**NO_FACTS), QUANT_STATE, "nested_blocksize is missing; expected 256"),
    ("nested part on a plain one", {**state_of(PLAIN), NA: torch.ones(1)}, NM, "is missing"),
    ("nested blocksize", facts(nested_blocksize=64), QUANT_STATE, "nested_blocksize is 64; expected 256"),
    ("nested blocksize float", facts(nested_blocksize=256.0), QUANT_STATE, "nested_blocksize is 256.0; expected 256"),
    ("nested dtype", facts(nested_dtype="float16"), QUANT_STATE, "nested_dtype is 'float16'; expected float32"),
    ("no offset", facts(nested_offset=...), QUANT_STATE, "nested_offset is missing; expected a finite number"),
    ("offset null", facts(nested_offset=None), QUANT_STATE, "nested_offset is None; expected a finite number"),
    ("offset NaN", facts(nested_offset=NAN), QUANT_STATE, "nested_offset is nan; expected a finite number"),
    ("offset infinite", facts(nested_offset=-INF), QUANT_STATE, "nested_offset is -inf; expected a finite number"),
    ("offset beyond float32", facts(nested_offset=1e39), QUANT_STATE, "nested_offset is 1e+39; expected a finite"),
    ("offset without end", facts(nested_offset=10**400), QUANT_STATE, "nested_offset is 1000"),
    ("offset a text", facts(nested_offset="0.1"), QUANT_STATE, "nested_offset is '0.1'; expected a finite number"),
    ("offset true", facts(nested_offset=True), QUANT_STATE, "nested_offset is True; expected a finite number"),
    # the description
    ("quant_type fp4", facts(quant_type="fp4"), QUANT_STATE, "quant_type is 'fp4'; expected 'nf4'"),
    ("no quant_type", facts(quant_type=...), QUANT_STATE, "quant_type is missing; expected 'nf4'"),
    ("blocksize 16", facts(blocksize=16), QUANT_STATE, f"blocksize is 16; {SIZES}"),
    ("blocksize 8192", facts(blocksize=8192), QUANT_STATE, f"blocksize is 8192; {SIZES}"),
    ("blocksize of another weight", facts(blocksize=64), A, "has 42 elements; expected 21"),
    ("blocksize 0", facts(blocksize=0), QUANT_STATE, f"blocksize is 0; {SIZES}"),
    ("blocksize negative", facts(blocksize=-64), QUANT_STATE, f"blocksize is -64; {SIZES}"),
    ("blocksize float", facts(blocksize=32.0), QUANT_STATE, f"blocksize is 32.0; {SIZES}"),
    ("blocksize a text", facts(blocksize="32"), QUANT_STATE, f"blocksize is '32'; {SIZES}"),
    ("blocksize true", facts(blocksize=True), QUANT_STATE, f"blocksize is True; {SIZES}"),
    ("blocksize a list", facts(blocksize=[32]), QUANT_STATE, f"blocksize is [32]; {SIZES}"),
    ("no blocksize", facts(blocksize=...), QUANT_STATE, f"blocksize is missing; {SIZES}"),
    ("dtype unknown", facts(dtype="float8_e4m3fn"), QUANT_STATE, "dtype is 'float8_e4m3fn'; expected one of float32"),
    ("dtype an attribute of torch", facts(dtype="load"), QUANT_STATE, "dtype is 'load'; expected one of float32"),
    ("dtype a number", facts(dtype=16), QUANT_STATE, "dtype is 16; expected one of float32, float16, bfloat16"),
    ("no dtype", facts(dtype=...), QUANT_STATE, "dtype is missing; expected one of float32"),
    ("shape of another weight", facts(shape=[40, 34]), "weight", "has 660 bytes; expected 680"),
    ("negative size", facts(shape=[-40, 33]), QUANT_STATE, "shape is [-40, 33]; expected two or three sizes"),
    ("two negative sizes", facts(shape=[-40, -33]), QUANT_STATE, "shape is [-40, -33]; expected two or three sizes"),
    ("float sizes", facts(shape=[40.0, 33]), QUANT_STATE, "shape is [40.0, 33]; expected two or three sizes"),
    ("true as a size", facts(shape=[True, 1320]), QUANT_STATE, "shape is [True, 1320]; expected two or three sizes"),
    ("null as a size", facts(shape=[None, 33]), QUANT_STATE, "shape is [None, 33]; expected two or three sizes"),
    ("one size", facts(shape=[1320]), QUANT_STATE, "shape is [1320]; expected two or three sizes"),
    ("four sizes", facts(shape=[1, 1, 40, 33]), QUANT_STATE, "shape is [1, 1, 40, 33]; expected two or three sizes"),
    ("no sizes", facts(shape=[]), QUANT_STATE, "shape is []; expected two or three sizes"),
    ("shape null", facts(shape=None), QUANT_STATE, "shape is None; expected two or three sizes"),
    ("no shape", facts(shape=...), QUANT_STATE, "shape is missing; expected two or three sizes"),
    ("2^62 elements", facts(shape=[2**31, 2**31]), QUANT_STATE, "expected fewer elements than 2^62"),
    ("2^64 elements", facts(shape=[2**32, 2**32]), QUANT_STATE, "expected fewer elements than 2^62"),
    ("a size beyond 64 bits", facts(shape=[2**70, 1]), QUANT_STATE, "expected fewer elements than 2^62"),
    ("2^64 + 1320 elements", facts(shape=[1, 2**64 + 1320]), QUANT_STATE, "expected fewer elements than 2^62"),
    ("2^33 elements", facts(shape=[2**20, 2**13]), "weight", f"has 660 bytes; expected {2**32}"),
    ("unknown fact", facts(zero_point=3), QUANT_STATE, "'zero_point' is unknown; it may change what the bytes mean"),
    # its text
    ("JSON cut short", text(lambda t: t[:-9]), QUANT_STATE, "the quantisation state is not valid JSON"),
    ("JSON empty", text(lambda t: b""), QUANT_STATE, "the quantisation state is not valid JSON"),
    ("JSON a list", text(lambda t: b"[1, 2]"), QUANT_STATE, "is a JSON list; expected an object"),
    ("JSON null", text(lambda t: b"null"), QUANT_STATE, "is a JSON NoneType; expected an object"),
    ("JSON nested deeply", text(lambda t: b"[" * 4000), QUANT_STATE, "the quantisation state is not valid JSON"),
    ("a key twice", text(lambda t: b'{"shape": [40, 33], ' + t[1:]), QUANT_STATE, "the key 'shape' stands twice"),
    ("no UTF-8", text(lambda t: b"\xff\xfe" + t), QUANT_STATE, "the quantisation state is not valid JSON"),
    ("zeros", text(lambda t: bytes(len(t))), QUANT_STATE, "the quantisation state is not valid JSON"),
    ("text without end", text(lambda t: t + b" " * 5000), QUANT_STATE, "expected torch.uint8, the text of a JSON"),
    ("text as integers", entry(QUANT_STATE, lambda t: t.int()), QUANT_STATE, "is torch.int32 ["),
    ("text on meta", entry(QUANT_STATE, lambda t: t.to("meta")), QUANT_STATE, "on meta; expected torch.uint8"),
]  # fmt: skip


CASES = pytest.mark.parametrize(
    ("state", "key", "says"), [case[1:] for case in CORRUPT], ids=[case[0] for case in CORRUPT]
)


@CASES
def test_corrupt_states_are_refused_by_key(state, key, says):
    """The message begins with the key, and is short whatever stands in the state."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        from_state(state)
    message = str(caught.value)
    assert message.startswith(f"{key}: ")
    assert says in message
    assert len(message) < 600


@CASES
def test_nothing_is_half_loaded(state, key, says):
    """A module keeps the weight and the bias that it had, and names the key as the checkpoint has it."""
    model = nn.Sequential(NF4Linear(33, 40, blocksize=32))
    layer, bias = model[0], model[0].bias.detach().clone()
    weight, tensors = layer.weight, [tensor.clone() for tensor in layer.weight.tensors]
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict({f"0.{name}": value for name, value in {**state, "bias": torch.ones(40)}.items()})
    assert f"0.{key}" in str(caught.value)
    assert layer.weight is weight
    assert all(torch.equal(a, b) for a, b in zip(layer.weight.tensors, tensors, strict=True))
    assert torch.equal(layer.bias, bias)


def test_the_states_that_were_spoilt_are_good():
    for q in (Q, PLAIN):
        assert torch.equal(from_state(state_of(q)).dequantize(), q.dequantize())


def test_what_is_no_state():
    for state in ({}, {"weight": torch.zeros(40, 33)}):
        with pytest.raises(ValueError, match=r"^weight\.quant_state\.bitsandbytes__nf4: is missing$"):
            from_state(state)


def test_a_name_within_a_model():
    named = {f"model.0.{key}": tensor for key, tensor in entry(A, lambda t: t[:-1]).items()}
    with pytest.raises(ValueError, match=r"^model\.0\.weight\.absmax: has 41 elements; expected 42$"):
        from_state(named, "model.0.weight")


def test_no_text_of_a_state_does_anything_but_load_or_raise_value_error():
    """Bytes of the description changed at random: what still loads describes the same bytes."""
    chance, good = random.Random(0), bytes(state_of(Q)[QUANT_STATE].tolist())
    loaded = 0
    for _ in range(500):
        spoiled = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            spoiled[chance.randrange(len(spoiled))] = chance.choice(
                (chance.randrange(256), ord("0"), ord('"'), ord("9"))
            )
        try:
            q = from_state(with_text(state_of(Q), bytes(spoiled)))
        except ValueError:
            continue
        loaded += 1
        assert q.shape.numel() in (1319, 1320)
        assert q.dequantize().shape == q.shape
    assert loaded < 100, "most changes are noticed"


def test_f06_2_to_the_31_elements_and_more():
    """Sizes, numbers of blocks and the description of weights whose elements 32 bits do not number, and the last rows
    of one that is read from a state. The bytes are zeros that no memory backs but where they are read."""
    for shape in ((2**16, 2**15), (2**17, 2**16 + 1), (8, 2**15, 2**15)):
        numel = torch.Size(shape).numel()
        q = nf4.quantize(torch.empty(shape, device="meta", dtype=BF16))
        assert q.packed.numel() == (numel + 1) // 2
        assert q.absmax.numel() == -(-numel // 64)
        assert q.nested_absmax.numel() == -(-numel // 64 // 256)
        assert q.dequantize().shape == shape
    n, k = 2**17 + 3, 2**15 + 1
    packed, absmax = zeros_without_memory((n * k + 1) // 2, "cpu"), torch.full((-(-n * k // 4096),), 0.5)
    packed[-1], packed[-2], absmax[-1] = 0xF7, 0x0F, 3.0
    whole = NF4Weight(packed, absmax, None, None, None, torch.Size((n, k)), F32, 4096)
    q = from_state(nf4.to_state(whole))
    assert (q.shape, q.packed.data_ptr()) == (whole.shape, packed.data_ptr())
    assert q.rows(n - 1, n).columns(k - 4, k).dequantize().tolist() == [[-0.5, -3.0, 3.0, 3.0]]
    assert q.rows(n - 2, n - 1).columns(0, 3).dequantize().tolist() == [[-0.5, -0.5, -0.5]]


def test_f06_numbers_of_elements_in_64_bits():
    """The specification takes the numbers of elements as they are, 2^33 and more."""
    q, rows = huge_weight(2, 70, 2**33 + 1, "cpu")
    numbers = 2**33 + 1 + torch.arange(70)
    assert torch.equal(reference.elements(q, numbers), rows[1])


@pytest.mark.parametrize("blocksize", nf4.BLOCKSIZES)
def test_f13_every_blocksize(blocksize):
    """Through a state, at sizes that no block divides; the blocks are those of the format's definition."""
    weight = torch.randn(7, 1001)
    q = from_state(nf4.to_state(nf4.quantize(weight, blocksize, False)))
    padded = torch.nn.functional.pad(weight.view(-1), (0, -7007 % blocksize)).view(-1, blocksize)
    assert torch.equal(q.absmax, padded.abs().amax(1))
    largest = weight.view(-1)[padded.abs().argmax(1) + torch.arange(len(padded)) * blocksize]
    decoded = q.dequantize().view(-1)[padded.abs().argmax(1) + torch.arange(len(padded)) * blocksize]
    assert torch.equal(decoded.abs(), largest.abs())


@pytest.mark.parametrize("blocksize", [16, 48, 96, 8192, 0, -64, 64.0, "64", None])
def test_f13_no_other_blocksize(blocksize):
    with pytest.raises(ValueError, match=r"blocksize is .*; expected one of 32, 64, 128"):
        nf4.quantize(torch.ones(4, 64), blocksize)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 65), (7, 7), (1, 127)])
def test_f14_odd_element_counts(shape):
    """The half of the last byte that belongs to no element is index 7; what stands there when read does not matter."""
    q = nf4.quantize(torch.randn(shape), 32)
    assert q.packed[-1] & 15 == 7
    other = q._replace(packed=q.packed.clone())
    other.packed[-1] ^= 15
    assert torch.equal(other.dequantize(), q.dequantize())
    read = from_state(nf4.to_state(other))
    assert torch.equal(read.packed, other.packed)


def test_f14_the_table_is_the_same_on_every_device_and_in_every_dtype():
    """It is never rounded: a weight of bfloat16 is a product of float32 numbers, rounded once."""
    q = nf4.quantize(torch.linspace(-1, 1, 16).view(1, 16), 32, False)
    q = q._replace(packed=torch.arange(0, 256, 34, dtype=torch.uint8) + torch.tensor(1, dtype=torch.uint8))
    for dtype in (F32, F16, BF16):
        assert q.packed.tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
        assert torch.equal(q.dequantize(dtype)[0], torch.tensor(nf4.CODE).to(dtype))
        third = q._replace(absmax=torch.tensor([1 / 3]))
        assert torch.equal(third.dequantize(dtype)[0], (torch.tensor(nf4.CODE) * torch.tensor(1 / 3)).to(dtype))
