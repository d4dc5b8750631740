"""The benchmarks of many adapters: no speed for a wrong result, peers called as they document, bars of known sizes."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import compare, gate, many, multi_time, peers, provenance, rounds
from benchmarks.problems import FORWARD, FORWARD_BACKWARD, Ceilings
from peft_kernels import dispatch
from peft_kernels.formats.adapter_table import ROW
from tests.test_benchmarks import spoil


@pytest.fixture(autouse=True)
def _forget_what_was_checked():
    gate.check.cache_clear()
    yield
    gate.check.cache_clear()


def test_mixed_batches_agree_with_peft_before_they_are_timed(monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(multi_time, "SAMPLES", 6)
    monkeypatch.setattr(multi_time, "SIZE", 32)
    for dtype in (torch.float32, torch.bfloat16):
        for pair in multi_time.mixed_batch(2, 3, dtype, None):
            assert pair.theirs().shape == pair.ours().shape == (6, 2, 32)
    training = multi_time.training(3, 0.5)
    assert [len(training.ours()), len(training.theirs())] == [7, 3]
    ratio = dict.fromkeys(compare.Ratio._fields, 1.0)
    assert len(multi_time.cells({**training._asdict(), **ratio})) == len(multi_time.HEADERS)
    monkeypatch.setattr(multi_time.functional, "multi_lora_linear", lambda x, *_, **__: x)
    with pytest.raises(AssertionError, match="they differ"):
        multi_time.mixed_batch(2, 3, torch.float32, None)


MANY = many.ManySpec(48, 64, 96, 12, adapters=5, tokens=4, ranks=(12, 1, 8))
TRAINED = replace(MANY, work=many.TRAINING)
ALONE = many.ManySpec(48, 64, 96, 12, adapters=5, work=many.DELTA)


def many_peer(name: str) -> peers.Peer:
    return next(peer for peer in many.PEERS if peer.name == name)


@pytest.mark.parametrize("spec", [MANY, TRAINED, replace(MANY, dtype=torch.bfloat16)], ids=lambda spec: spec.label)
def test_the_gate_lets_right_layers_of_many_adapters_pass(spec):
    checked = {peer.name: gate.check(peer, spec) for peer in many.PEERS if peer.unavailable(spec) is None}
    assert {"frozen", "peft", "ours (auto)", "ours (composed)", "ours (reference)"} <= set(checked)
    assert ("one adapter" in checked) == (spec.work == many.TRAINING) == ("ours, pool" not in checked)
    grads = many.PEFT.layer(spec).result()[1]
    assert set(grads) == set(spec.case().grads) == (set(many.AUTO.layer(spec).result()[1]))
    assert len(grads) == (11 if spec.work == many.TRAINING else 0)


@pytest.mark.parametrize("spoiled", ["forward", "backward"])
def test_the_gate_refuses_a_wrong_layer_of_many_adapters(monkeypatch, spoiled):
    module = dispatch.implementation("multi_lora_linear", "composed")
    right = getattr(module, spoiled)
    monkeypatch.setattr(module, spoiled, lambda *arguments: spoil(right(*arguments)))
    spec = TRAINED if spoiled == "backward" else MANY
    with pytest.raises(gate.WrongResult, match=r"ours \(composed\) is wrong.*not timed"):
        gate.check(many_peer("ours (composed)"), spec)
    gate.check(many_peer("ours (reference)"), spec)


def test_every_peer_of_many_adapters_is_runnable_or_says_why_not():
    specs = [*many.layer_specs(), *many.training_specs()]
    assert len({spec.label for spec in specs}) == len(specs)
    for spec in specs:
        for peer in many.PEERS:
            reason = peer.unavailable(spec)
            assert reason is None or len(reason) > 10, f"{peer.name}: {reason!r}"
        assert peers.chosen_backend(spec).op == "multi_lora_linear"
    alone = {peer.name: peer.unavailable(replace(ALONE, device="cuda")) for peer in (many.FROZEN, many.PEFT, many.AUTO)}
    assert None not in alone.values(), "they compute whole layers"


class Published:
    """vLLM's and punica's functions by what they document, and our CUDA kernel's by its table."""

    @staticmethod
    def make(max_loras, max_num_tokens, device):
        meta = SimpleNamespace()
        meta.prepare_tensors = lambda mapping: setattr(meta, "mapping", mapping)
        meta.meta_args = lambda token_nums, specialize_active_lora: (meta.mapping[:token_nums], "of the meta data")
        return meta

    @staticmethod
    def lora_shrink(inputs, lora_a_weights, output_tensor, mapping, of_meta, scaling):
        (a,) = lora_a_weights
        assert (output_tensor.dtype, output_tensor.shape) == (torch.float32, (1, len(inputs), a.shape[1]))
        output_tensor[0] = scaling * torch.einsum("mk,mrk->mr", inputs, a[mapping])

    @staticmethod
    def lora_expand(inputs, lora_b_weights, output_tensor, mapping, of_meta, offset_start=0, add_inputs=False):
        update = torch.einsum("mr,mnr->mn", inputs[0].to(output_tensor.dtype), lora_b_weights[0][mapping])
        output_tensor[:, offset_start:] = update + output_tensor * add_inputs

    @staticmethod
    def add_lora_bgmv(y, x, wa_T_all, wb_T_all, indicies, layer_idx, scale):
        s = torch.einsum("mk,mrk->mr", x, wa_T_all[indicies, layer_idx])
        y += scale * torch.einsum("mr,mnr->mn", s, wb_T_all[indicies, layer_idx])

    @staticmethod
    def add_updates(ys, x, adapters, ids, mix):
        (y,), table = ys, adapters.table(x.device)
        assert (adapters.dtype, mix, ids.shape) == (torch.float32, None, (len(x), 1))
        for row, adapter in enumerate(ids[:, 0].tolist()):
            entry = table.rows[adapter, table.layers[0]].numpy().tobytes()
            a, b, r, scaling, stride_a, stride_b = ROW.unpack(entry)
            assert (stride_a, stride_b) == (x.shape[1], r)
            y[row] += scaling * _at(b, y.shape[1], r) @ (_at(a, r, x.shape[1]) @ x[row])


def _at(address: int, *shape: int) -> torch.Tensor:
    numbers = shape[0] * shape[1]
    return torch.frombuffer((ctypes.c_float * numbers).from_address(address), dtype=torch.float32).view(shape)


@pytest.mark.parametrize("name", ["vllm", "punica", "ours (cuda)"])
def test_kernels_of_a_gpu_are_called_as_published(monkeypatch, name):
    """With the arguments that they document, alone and in a layer; none of them can run here."""
    kernels = SimpleNamespace(
        LoRAKernelMeta=Published, lora_shrink=Published.lora_shrink, lora_expand=Published.lora_expand,
        add_lora_bgmv=Published.add_lora_bgmv,
    )  # fmt: skip
    for module in ("vllm.lora.ops.triton_ops", "punica.ops"):
        monkeypatch.setitem(sys.modules, module, kernels)
    monkeypatch.setattr(dispatch.implementation("multi_lora_linear", "cuda"), "add_updates", Published.add_updates)
    gate.check(many_peer(name), ALONE)
    if name != "ours (cuda)":
        gate.check(many_peer(name), replace(MANY, ranks=()))
    layer = many_peer(name).layer(ALONE)
    step = layer.step(FORWARD)
    assert layer.leaves["x"].shape == (48, 64)
    step()
    step()


def test_floor_of_many_adapters():
    """The update of decoding on an H200's 4.3 TB/s, a launch left out; and what is counted of a layer."""
    ceilings = Ceilings(790e12, 4.3e12)
    bf16 = torch.bfloat16
    for m, expected in ((1, 0.07e-6), (64, 4.27e-6), (256, 17.1e-6)):
        spec = many.ManySpec(m, 4096, 4096, 16, bf16, bf16, device="cuda", adapters=m, work=many.DELTA)
        assert spec.floor(FORWARD, ceilings) == pytest.approx(expected, rel=0.05)
    assert MANY.ids() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    ranks = 4 * (12 * 3 + 1 * 3 + 8 * 2 + 12 * 2 + 1 * 2)  # of all rows; the adapters' are 12, 1, 8, 12 and 1
    assert MANY.flop(FORWARD) == 2 * 48 * 64 * 96 + 2 * ranks * 160
    assert TRAINED.flop(FORWARD_BACKWARD) == 2 * (2 * 48 * 64 * 96) + 3 * (2 * ranks * 160)
    assert MANY.bytes(FORWARD) == 4 * (48 * 64 + 64 * 96 + 48 * 96 + 34 * 160)
    assert len(set(replace(MANY, adapters=64).ids())) == 12


def test_a_row_of_many_adapters():
    """Adapters and bars are in it, and who it is compared with in its rounds."""
    small = replace(MANY, threads=1)
    found = rounds.facts(many.POOL, small, FORWARD, "exact mask", rounds.stopwatch(many.POOL, small, FORWARD))
    assert (found["adapters"], found["tokens_per_sample"], found["ranks"]) == (5, 4, [12, 1, 8])
    assert found["saved_bytes"] == 0, "it serves"
    assert found["digest"] == provenance.digest("multi_lora_linear", found["backend"])
    assert found["bars"] == {}, "it is none of the sizes that have one"
    barred = {peer.name for peer in many.PEERS if "bars" in many.facts(peer, small)}
    assert barred == {"ours (auto)", "ours, pool"}, "what nobody chose misses no bar"
    assert "bars" in many.facts(many_peer("ours (cuda)"), ALONE)
    for spec, expected in ((small, ["peft", "frozen"]), (TRAINED, ["peft", "frozen", "one adapter"])):
        baselines = rounds.peers_of(spec).BASELINES
        assert [peer.name for peer in baselines if peer.unavailable(spec) is None] == expected
    size = many.ManySpec(512, 1024, 1024, 16, adapters=64, tokens=8)
    assert many.bars(size) == {"ratio_to_peft": pytest.approx(1 / 2.2)}
    assert many.bars(replace(size, m=64, tokens=1)) == {"ratio_to_peft": 0.25}
    assert many.bars(replace(size, work=many.TRAINING)) == {"ratio_to_one adapter": pytest.approx(1.5)}
    assert many.bars(ALONE) == dict.fromkeys(("ratio_to_vllm", "ratio_to_punica"), pytest.approx(2 / 3))
