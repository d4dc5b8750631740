"""`AdapterPool`: what is in its memory, who goes when there is no room, and how rows find their adapters."""

from __future__ import annotations

import copy
import pickle
import shutil
import threading

import pytest
import torch
from torch import nn

import peft_kernels
from peft_kernels import AdapterPool
from peft_kernels.formats import _pool_device
from peft_kernels.formats.adapter_table import EMPTY_ROW, ROW
from peft_kernels.formats.pool import PoolFullError, UnknownAdapterError
from peft_kernels.functional import multi_lora_linear, multi_lora_linear_group
from tests.adapter_files import base_model, good_config, good_tensors, write_folder
from tests.formats.pools import SIZES, assert_rows, audit, drawn, put, run_bytes

SMALL = run_bytes(drawn(8, 0))
"""Bytes of an adapter of rank 1 to 8."""


def pool_of(adapters: float, **options) -> AdapterPool:
    """A pool with room for so many small adapters."""
    return AdapterPool(SIZES, budget=int(adapters * SMALL), **options)


class TestMemory:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_rows_of_mixed_ranks(self, dtype):
        """Ranks between and on pages, a layer that an adapter lacks, and the base."""
        pool = AdapterPool(SIZES, budget=2**18, dtype=dtype)
        adapters = {f"r{r}": put(pool, f"r{r}", drawn(r, r)) for r in (1, 7, 8, 9, 64, 96)}
        adapters["partial"] = put(pool, "partial", drawn(3, 5, layers=["down"]))
        names = [*reversed(adapters), "__base__", "r8", "r1"]
        assert_rows(pool, names, adapters, pool.ids(names))
        audit(pool)

    def test_pages_of_eight_ranks_and_no_more(self):
        pool = AdapterPool(SIZES, budget=2**17, dtype=torch.float16)
        for r in (1, 8, 9, 16, 17, 512):
            before = pool.stats().bytes_used
            adapter = put(pool, f"r{r}", drawn(r, r))
            assert pool.stats().bytes_used - before == run_bytes(adapter, itemsize=2)

    def test_table(self):
        """Addresses that kernels can load 16 bytes from, strides of pages, and zeros in the rest of a page."""
        pool = pool_of(4)
        put(pool, "one", drawn(8, 1))
        adapter = put(pool, "two", drawn(3, 2, layers=["down"]))
        (slot,) = pool.ids(["two"]).tolist()
        rows, arena = pool._memory.rows, pool._memory.arena
        assert rows[slot, 0].numpy().tobytes() == EMPTY_ROW
        a, b, r, scaling, a_stride, b_stride = ROW.unpack(rows[slot, 1].numpy().tobytes())
        assert (r, scaling, a_stride, b_stride) == (3, adapter.scaling, 24, 8)
        assert a % 256 == b % 256 == 0
        lora_A, lora_B = adapter.factors["down"]
        at_a, at_b = ((address - arena.data_ptr()) // 4 for address in (a, b))
        held_A, held_B = arena[at_a : at_a + 8 * 24].view(8, 24), arena[at_b : at_b + 16 * 8].view(16, 8)
        assert torch.equal(held_A[:3], lora_A)
        assert torch.equal(held_B[:, :3], lora_B)
        assert not held_A[3:].any()
        assert not held_B[:, 3:].any()

    def test_groups_of_layers(self):
        pool = AdapterPool({"q": (8, 16), "other": (4, 4), "v": (12, 16)}, budget=2**16)
        adapter = put(pool, "one", drawn(3, 1, ["q", "v"], pool.sizes))
        x, weights = torch.randn(2, 16), (torch.randn(8, 16), torch.randn(12, 16))
        layers = [pool.layer("q"), pool.layer("v")]
        q, v = multi_lora_linear_group(x, weights, layers, None, pool.ids(["one", "__base__"]))
        for y, weight, name in ((q, weights[0], "q"), (v, weights[1], "v")):
            lora_A, lora_B = adapter.factors[name]
            torch.testing.assert_close(y[0], x[0] @ weight.t() + adapter.scaling * (x[0] @ lora_A.t() @ lora_B.t()))
            torch.testing.assert_close(y[1], x[1] @ weight.t())

    @pytest.mark.parametrize("bounce", [256, 2**22])
    def test_compaction_moves_over_itself(self, monkeypatch, bounce):
        """A large adapter goes down by less than its own length, in pieces or in one."""
        monkeypatch.setattr(_pool_device, "_BOUNCE_BYTES", bounce)
        large = drawn(40, 3)
        pool = AdapterPool(SIZES, budget=run_bytes(large) + 2 * SMALL)
        put(pool, "first", drawn(2, 1))
        adapters = {"large": put(pool, "large", large)}
        pool.remove("first")
        adapters["wide"] = put(pool, "wide", drawn(16, 4))
        stats = pool.stats()
        assert (stats.compactions, stats.bytes_moved, stats.evictions) == (1, run_bytes(large), 1)
        assert stats.bytes_free == 0
        assert_rows(pool, ["wide", "large"], adapters, pool.ids(["wide", "large"]))
        audit(pool)

    def test_what_is_in_use_is_not_moved(self):
        pool = pool_of(3)
        adapters = {name: put(pool, name, drawn(8, i)) for i, name in enumerate("abc")}
        with pool.use(["b"]) as ids:
            before = pool._memory.rows.clone()
            with pytest.raises(PoolFullError, match=r"1 adapters are pinned or in use: 'b'"):
                put(pool, "wide", drawn(16, 4))  # a and c are free to go, but b lies between them
            assert torch.equal(pool._memory.rows, before)
            assert_rows(pool, ["b"], adapters, ids)
        adapters["wide"] = put(pool, "wide", drawn(16, 4))
        assert pool.stats().evictions == 2
        assert_rows(pool, ["wide", "c"], adapters, pool.ids(["wide", "c"]))

    def test_what_is_asked_for_together_may_be_moved(self):
        """Two adapters that lie apart do not keep a third from the free bytes around them."""
        pool = pool_of(4)
        adapters = {"wide": put(pool, "wide", drawn(16, 9))}
        pool.evict("wide")
        for i, name in enumerate("axby"):
            adapters[name] = put(pool, name, drawn(8, i))
        for name in "xy":
            pool.remove(name)
        with pool.use(["a", "b", "wide"]) as ids:
            assert_rows(pool, ["a", "b", "wide"], adapters, ids)
        assert (pool.stats().compactions, pool.stats().evictions) == (1, 3)


class TestResidency:
    def test_the_least_recently_used_goes(self):
        pool = pool_of(3)
        adapters = {name: put(pool, name, drawn(4, i)) for i, name in enumerate("abc")}
        pool.ids(["a"])
        adapters["d"] = put(pool, "d", drawn(4, 9))
        assert [pool._state.known[name].place is not None for name in "abcd"] == [True, False, True, True]
        with pool.use(["c"]):
            pass
        assert pool.ids(["b"]).tolist() != [-1]  # comes back, and a, then d, have not been used for longest
        assert pool._state.known["a"].place is None
        assert_rows(pool, ["d", "b", "c"], adapters, pool.ids(["d", "b", "c"]))
        stats = pool.stats()
        assert (stats.hits, stats.misses, stats.evictions) == (5, 1, 2)

    def test_comes_back_without_its_files(self, tmp_path):
        pool = AdapterPool({"first": (5, 6), "second": (4, 5)}, budget=2**14)
        pool.load("one", write_folder(tmp_path))
        before = pool._memory.arena[: pool.stats().bytes_used // 4].clone()
        shutil.rmtree(tmp_path)
        pool.evict("one")
        assert pool.stats().bytes_used == 0
        assert not pool._memory.rows.any()
        pool._memory.arena.zero_()
        pool.ids(["one"])
        assert torch.equal(pool._memory.arena[: len(before)], before)

    def test_host_budget(self, tmp_path):
        """The copy that was not used for longest goes. Without one, an evicted adapter is unknown, or read again."""
        pool = AdapterPool({"first": (5, 6), "second": (4, 5)}, budget=2**14, host_budget=2 * 1024)
        tensors = {"first": (torch.randn(2, 6), torch.randn(5, 2))}
        folder = write_folder(tmp_path)
        pool.load("file", folder)
        assert pool.stats().host_bytes == 1024
        for name in "ab":
            pool.load(name, tensors, scaling=1.0)
        pool.ids(["file"])
        pool.load("c", tensors, scaling=1.0)
        stats = pool.stats()
        assert (stats.host_copies, stats.host_bytes, stats.dropped, stats.adapters) == (3, 2048, 1, 4)
        assert list(pool._state.copies) == ["b", "file", "c"]
        pool.evict("b")
        pool.evict("a")
        assert pool.names == ["file", "b", "c"]
        audit(pool)

    def test_reads_its_folder_again(self, tmp_path):
        sizes = {"first": (5, 6), "second": (4, 5)}
        pool = AdapterPool(sizes, budget=2**14, host_budget=0)
        folder = write_folder(tmp_path)
        pool.load("file", folder)
        pool.load("tensors", {"first": (torch.randn(2, 6), torch.randn(5, 2))}, scaling=1.0)
        pool.evict("tensors")
        assert pool.names == ["file"]
        with pytest.raises(UnknownAdapterError, match=r"no adapter 'tensors'; its adapters are 'file'"):
            pool.ids(["tensors"])
        pool.evict("file")
        write_folder(tmp_path, good_config(lora_alpha=8))
        slot = int(pool.ids(["file"]))
        assert ROW.unpack(pool._memory.rows[slot, 0].numpy().tobytes())[3] == 4.0
        assert pool.stats().rereads == 1
        pool.evict("file")
        shutil.rmtree(folder)
        with pytest.raises(FileNotFoundError):
            pool.ids(["file"])
        assert "file" in pool

    def test_pinned_stays(self):
        pool = pool_of(2)
        adapters = {"a": put(pool, "a", drawn(4, 1), pin=True)}
        for i in range(5):
            adapters[f"n{i}"] = put(pool, f"n{i}", drawn(4, i))
        assert pool._state.known["a"].place is not None
        pool.pin("n0")
        pool.pin("n0")
        assert pool.stats().pinned == 2
        assert_rows(pool, ["a", "n0"], adapters, pool.ids(["a", "n0"]))
        pool.unpin("a")
        pool.unpin("a")
        pool.ids(["n3"])
        assert pool._state.known["a"].place is None
        audit(pool)

    def test_prefetch(self):
        pool = pool_of(2)
        adapters = {name: put(pool, name, drawn(4, i)) for i, name in enumerate("abcd")}
        pool.prefetch(["a", "b", "__base__"])
        stats = pool.stats()
        assert (stats.prefetches, stats.misses, stats.resident) == (2, 0, 2)
        assert_rows(pool, ["b", "a"], adapters, pool.ids(["b", "a"]))
        assert (pool.stats().hits, pool.stats().misses) == (2, 0)

    def test_use(self):
        pool = pool_of(3)
        for i, name in enumerate("abc"):
            put(pool, name, drawn(4, i))
        assert pool.active_ids is None
        with pool.use(["b", "__base__", "a", "b"]) as ids:
            assert ids.dtype == torch.int64
            assert ids.tolist()[1] == -1
            assert pool.active_ids is ids
            assert pool.stats().in_use == 2
            with pool.use(["a"]) as inner:
                assert pool.active_ids is inner
            assert pool.active_ids is ids
            assert pool.stats().in_use == 2
            seen = []
            thread = threading.Thread(target=lambda: seen.append(pool.active_ids))
            thread.start()
            thread.join()
            assert seen == [None]
        assert pool.active_ids is None
        assert pool.stats().in_use == 0
        audit(pool)

    def test_empty_and_base_only(self):
        pool = pool_of(1)
        assert pool.ids([]).shape == (0,)
        assert pool.ids(["__base__"] * 3).tolist() == [-1, -1, -1]
        assert_rows(pool, ["__base__"] * 3, {}, pool.ids(["__base__"] * 3))


class TestReplacement:
    @pytest.mark.parametrize("room", [1, 4], ids=["of one", "of four"])
    def test_keeps_its_id_and_its_pin(self, room):
        """Also where old and new do not fit side by side."""
        pool = pool_of(room)
        put(pool, "a", drawn(4, 1), pin=True)
        ids = pool.ids(["a"])
        adapters = {"a": put(pool, "a", drawn(7, 2, layers=["up"]))}
        assert torch.equal(pool.ids(["a"]), ids)
        assert_rows(pool, ["a"], adapters, ids)
        stats = pool.stats()
        assert (stats.adapters, stats.pinned, stats.loads, stats.replacements) == (1, 1, 2, 1)
        assert stats.bytes_used == run_bytes(adapters["a"])
        audit(pool)

    def test_open_blocks_go_on_with_the_old_one(self):
        pool = pool_of(3)
        old = {"a": put(pool, "a", drawn(4, 1), pin=True)}
        with pool.use(["a"]) as ids, pool.use(["a"]):
            new = {"a": put(pool, "a", drawn(4, 2))}
            later = pool.ids(["a"])
            assert later.tolist() != ids.tolist()
            assert_rows(pool, ["a"], old, ids)
            assert_rows(pool, ["a"], new, later)
            audit(pool)
            put(pool, "b", drawn(4, 3))
            put(pool, "c", drawn(4, 4))  # b goes, not the old a
            assert_rows(pool, ["a"], old, ids)
        assert pool.stats().bytes_used == 2 * SMALL
        assert_rows(pool, ["a"], new, pool.ids(["a"]))
        audit(pool)

    def test_of_an_evicted_one(self):
        pool = pool_of(2)
        put(pool, "a", drawn(4, 1))
        pool.evict("a")
        adapters = {"a": put(pool, "a", drawn(4, 2))}
        assert_rows(pool, ["a"], adapters, pool.ids(["a"]))
        pool.evict("a")
        assert_rows(pool, ["a"], adapters, pool.ids(["a"]))


class TestFiles:
    @pytest.mark.parametrize("use_rslora", [False, True])
    def test_rows_equal_peft(self, tmp_path, use_rslora):
        """Ranks and alphas by pattern, and a layer of its own for one adapter, against PEFT's models."""
        peft = pytest.importorskip("peft")
        pool = AdapterPool.for_model(base_model(), budget=2**15)
        x, expected = torch.randn(3, 6), []
        configs = (
            {
                "r": 4,
                "rank_pattern": {"second": 9},
                "alpha_pattern": {"first": 5},
                "target_modules": ["first", "second"],
            },
            {"r": 2, "lora_alpha": 7, "target_modules": ["second"]},
        )
        for i, config in enumerate(configs):
            torch.manual_seed(i)
            settings = peft.LoraConfig(use_rslora=use_rslora, init_lora_weights=False, **config)
            model = peft.get_peft_model(base_model(), settings)
            model.save_pretrained(tmp_path / str(i))
            pool.load(str(i), tmp_path / str(i))
            expected.append(model(x).detach())
        model = base_model()
        for names in (["0", "1", "0"], ["1", "__base__", "1"]):
            ids = pool.ids(names)
            hidden = multi_lora_linear(x, model.first.weight, pool.layer("first"), None, ids, bias=model.first.bias)
            y = multi_lora_linear(
                hidden.tanh(), model.second.weight, pool.layer("second"), None, ids, bias=model.second.bias
            )
            for row, name in enumerate(names):
                whole = model(x) if name == "__base__" else expected[int(name)]
                torch.testing.assert_close(y[row], whole[row])

    def test_what_this_library_saves(self, tmp_path):
        model = base_model()
        peft_kernels.add_lora(model, r=3, target_modules=["second"], lora_alpha=5)
        nn.init.normal_(model.second.lora_B)
        peft_kernels.save_adapter(model, tmp_path)
        pool = AdapterPool.for_model(base_model(), budget=2**14)
        pool.load("own", str(tmp_path))
        x = torch.randn(2, 5)
        y = multi_lora_linear(
            x, model.second.weight, pool.layer("second"), None, pool.ids(["own", "own"]), bias=model.second.bias
        )
        torch.testing.assert_close(y, model.second(x))


class TestForModel:
    def test_all_linear_layers(self):
        model = nn.ModuleDict({"block": base_model(), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 9, bias=False)})
        pool = AdapterPool.for_model(model.half(), budget=2**14, slots=7)
        assert pool.sizes == {"block.first": (5, 6), "block.second": (4, 5), "head": (9, 4)}
        assert (pool.dtype, pool.device.type) == (torch.float16, "cpu")
        assert pool._memory.rows.shape == (7, 3, 4)
        some = AdapterPool.for_model(model, budget=2**14, target_modules=["second", "head"], dtype=torch.float32)
        assert list(some.sizes) == ["block.second", "head"]
        assert some.dtype == torch.float32

    def test_adapted_and_quantised(self):
        peft = pytest.importorskip("peft")
        sizes = {"first": (5, 6), "second": (4, 5)}
        fused, quantised = base_model(), base_model().bfloat16()
        peft_kernels.add_lora(fused, r=2)
        peft_kernels.quantize_linears(quantised)
        both = peft.get_peft_model(base_model(), peft.LoraConfig(r=2, target_modules=["first"]))
        attached = base_model()
        peft_kernels.attach_pool(attached, AdapterPool.for_model(attached, budget=2**14))
        for model in (fused, both, quantised, attached, torch.compile(base_model())):
            pool = AdapterPool.for_model(model, budget=2**14)
            assert pool.sizes == sizes
        assert AdapterPool.for_model(quantised, budget=2**14).dtype == torch.bfloat16

    def test_conv1d(self):
        pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
        model = nn.ModuleDict({"c": pytorch_utils.Conv1D(7, 3)})
        assert AdapterPool.for_model(model, budget=2**14).sizes == {"c": (7, 3)}

    def test_refused(self):
        with pytest.raises(ValueError, match="no linear layer"):
            AdapterPool.for_model(nn.LayerNorm(3), budget=2**14)
        with pytest.raises(ValueError, match=r"no linear layer that target_modules = \['third'\] names"):
            AdapterPool.for_model(base_model(), budget=2**14, target_modules=["third"])
        model = base_model()
        model.first.double()
        with pytest.raises(ValueError, match=r"dtypes torch.float32, torch.float64; say dtype"):
            AdapterPool.for_model(model, budget=2**14)
        with pytest.raises(TypeError, match="Module"):
            AdapterPool.for_model(SIZES, budget=2**14)


class TestModes:
    def test_copies_share_the_pool_and_pickles_are_refused(self):
        pool = pool_of(2)
        assert copy.copy(pool) is copy.deepcopy({"pool": pool})["pool"] is pool
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(pool)

    def test_made_and_filled_in_inference_mode(self):
        """A pool that a server makes in inference mode gives gradients of x outside of it."""
        with torch.inference_mode():
            pool = pool_of(2)
            adapters = {"a": put(pool, "a", drawn(3, 1))}
            assert_rows(pool, ["a"], adapters, pool.ids(["a"]))
        x = torch.randn(1, 16, requires_grad=True)
        weight, ids = torch.randn(24, 16), pool.ids(["a"])
        y = multi_lora_linear(x, weight, pool.layer("up"), None, ids)
        lora_A, lora_B = adapters["a"].factors["up"]
        expected = torch.ones(1, 24) @ (weight + adapters["a"].scaling * lora_B @ lora_A)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)

    def test_parameters_and_other_layouts_are_taken(self):
        adapter = drawn(5, 3)
        odd = {
            layer: (nn.Parameter(a.t().contiguous().t().double()), nn.Parameter(b.double()))
            for layer, (a, b) in adapter.factors.items()
        }
        pool = pool_of(2)
        pool.load("a", odd, lora_alpha=dict.fromkeys(odd, adapter.scaling * 5))
        assert_rows(pool, ["a"], {"a": adapter}, pool.ids(["a"]))

    def test_loading_between_forward_and_backward_is_noticed(self):
        pool = pool_of(2)
        put(pool, "a", drawn(3, 1))
        x = torch.randn(1, 16, requires_grad=True)
        y = multi_lora_linear(x, torch.randn(24, 16), pool.layer("up"), None, pool.ids(["a"]))
        put(pool, "a", drawn(3, 2))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_max_rank_is_what_kernels_are_launched_for(self):
        free, fixed = pool_of(20), pool_of(20, max_rank=24)
        for pool in (free, fixed):
            put(pool, "a", drawn(3, 1, layers=["up"]))
        layers = ("up", "down")
        assert [free.adapters([free.layer(layer)]).widths for layer in layers] == [[3], [1]]
        assert [fixed.adapters([fixed.layer(layer)]).widths for layer in layers] == [[24], [24]]
        put(free, "b", drawn(9, 2))
        free.remove("b")
        assert free.adapters([free.layer("down")]).widths == [9]

    def test_good_tensors_are_what_the_folder_holds(self, tmp_path):
        """bfloat16 values of a pool are the file's, rounded once."""
        pool = AdapterPool.for_model(base_model().bfloat16(), budget=2**14)
        pool.load("a", write_folder(tmp_path))
        factors = pool.adapters([pool.layer("second")]).factors(0, int(pool.ids(["a"])))
        tensors = good_tensors()
        assert torch.equal(factors.A, tensors["base_model.model.second.lora_A.weight"].bfloat16())
        assert torch.equal(factors.B, tensors["base_model.model.second.lora_B.weight"].bfloat16())
        assert factors.scaling == 1.5
