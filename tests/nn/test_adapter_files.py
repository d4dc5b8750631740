"""Adapters travel between this library and PEFT in both directions, under clean names and with every bit."""

from __future__ import annotations

import json
import math
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peft_kernels import FusedLoRALinear, add_lora, load_adapter, merge_adapter, save_adapter
from tests.adapter_files import (
    CONFIG,
    WEIGHTS,
    A,
    base_model,
    good_config,
    good_tensors,
    write_folder,
)
from tests.helpers import relative_error
from tests.nn.models import bert, disturb, gpt2, output, snapshot

SETTINGS = {
    "plain": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 5},
    "BERT patterns": {
        "target_modules": ["query", "value", "output.dense"],
        "rank_pattern": {"value": 2, r"layer\.1\.attention\.output\.dense": 3},
        "alpha_pattern": {"value": 4, "encoder.layer.0.attention.self.query": 1.5},
    },
    "GPT-2 patterns": {
        "target_modules": ["c_attn", "c_proj", "lm_head"],
        "exclude_modules": ["h.1.mlp.c_proj"],
        "rank_pattern": {"mlp.c_proj": 2},
        "alpha_pattern": {r"h\.0\.attn\.c_proj": 2},
        "use_rslora": True,
    },
    "expression": {"target_modules": r".*\.[01]\..*(query|c_fc)", "lora_alpha": 3},
}
# The patterns of GPT-2 come with rsLoRA and exclusions; what is the same code for both models is on one.
OF_MODEL = {bert: ("plain", "rslora", "BERT patterns"), gpt2: ("plain", "GPT-2 patterns", "expression")}
CASES = [
    pytest.param(make, SETTINGS[key], id=f"{make.__name__} {key}") for make, keys in OF_MODEL.items() for key in keys
]


def ours_of(make, settings: dict) -> nn.Module:
    model = make()
    add_lora(model, 4, **settings)
    disturb(model)
    return model


def theirs_of(make, settings: dict, **changes) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 16, "fan_in_fan_out": make is gpt2, **settings, **changes})
    model = peft.get_peft_model(make(), config).eval()
    disturb(model)
    return model


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(("make", "settings"), CASES)
class TestWithPeft:
    def test_ours_to_peft_and_back(self, tmp_path, make, settings):
        peft = pytest.importorskip("peft")
        ours = ours_of(make, settings)
        expected = output(ours)
        assert relative_error(expected, output(make())) > 0.01
        save_adapter(ours, tmp_path / "ours")
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
        assert relative_error(output(theirs), expected) < 1e-5
        kinds = {
            name for name, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)
        }
        assert kinds == {name for name, m in ours.named_modules() if isinstance(m, FusedLoRALinear)}
        theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
        again = make()
        load_adapter(again, tmp_path / "theirs")
        assert torch.equal(output(again), expected)

    def test_peft_to_ours(self, tmp_path, make, settings):
        theirs = theirs_of(make, settings)
        theirs.save_pretrained(tmp_path, save_embedding_layers=False)
        expected = output(theirs)
        plain = make()
        report = load_adapter(plain, tmp_path)
        assert relative_error(output(plain), expected) < 1e-5
        assert len(report.layers) == sum("lora_A" in key for key in load_file(tmp_path / WEIGHTS))
        adapted = make()
        add_lora(adapted, 4, **{**settings, "lora_alpha": 99, "use_rslora": False, "alpha_pattern": None})
        load_adapter(adapted, tmp_path)
        assert torch.equal(output(adapted), output(plain))


def test_adapter_of_peft_in_half_precision_keeps_its_dtype(tmp_path):
    theirs = theirs_of(bert, {"target_modules": ["query"]})
    theirs.to(torch.bfloat16).save_pretrained(tmp_path)
    model = bert()
    load_adapter(model, tmp_path)
    layer = model.encoder.layer[0].attention.self.query
    assert layer.weight.dtype == torch.float32
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.bfloat16
    name = "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"
    assert torch.equal(layer.lora_A, load_file(tmp_path / WEIGHTS)[name])
    wide = bert()
    load_adapter(wide, tmp_path, adapter_dtype=torch.float32)
    assert torch.equal(wide.encoder.layer[0].attention.self.query.lora_A, layer.lora_A.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_saved_values_are_the_same_bits(tmp_path, dtype):
    model = base_model()
    add_lora(model, 2, adapter_dtype=dtype)
    disturb(model)
    save_adapter(model, tmp_path)
    again = base_model()
    load_adapter(again, tmp_path)
    for name, value in model.state_dict().items():
        assert again.state_dict()[name].dtype == value.dtype
        assert torch.equal(again.state_dict()[name], value)


def test_peft_adapter_with_a_name(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(base_model(), peft.LoraConfig(r=2, target_modules=["first"]), adapter_name="task_1")
    disturb(theirs)
    theirs.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["task_1"]
    model, x = base_model(), torch.randn(3, 6)
    load_adapter(model, tmp_path, adapter_name="task_1")
    assert torch.allclose(model(x), theirs(x), atol=1e-6)
    assert save_adapter(model, tmp_path / "ours", adapter_name="task_1") == tmp_path / "ours" / "task_1"
    again = peft.PeftModel.from_pretrained(base_model(), tmp_path / "ours" / "task_1")
    assert torch.allclose(again(x), theirs(x), atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_base_weights_in_the_file_are_refused(tmp_path):
    """PEFT adds those of an adapted output embedding on its own account."""
    theirs_of(gpt2, {"target_modules": ["lm_head"]}).save_pretrained(tmp_path)
    model = gpt2()
    assert_unchanged = snapshot(model)
    with pytest.raises(ValueError, match=r"lm_head\.base_layer\.weight.*save_embedding_layers=False"):
        load_adapter(model, tmp_path)
    assert_unchanged()


class TestConfiguration:
    def saved(self, model, folder, **options) -> dict:
        save_adapter(model, folder, **options)
        return json.loads((folder / CONFIG).read_text())

    def test_what_vllm_and_peft_read(self, tmp_path):
        model = gpt2()
        model.name_or_path = "some/model"
        add_lora(model, 4, ["c_attn"], lora_alpha=8, lora_dropout=0.05)
        config = self.saved(model, tmp_path, task_type="CAUSAL_LM")
        expected = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "some/model", "r": 4,
            "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": ["c_attn"], "bias": "none", "use_rslora": False,
            "use_dora": False, "lora_bias": False, "fan_in_fan_out": True, "modules_to_save": None, "rank_pattern": {},
            "alpha_pattern": {}, "revision": None, "init_lora_weights": True, "inference_mode": True,
            "exclude_modules": None,
        }  # fmt: skip
        assert config == expected

    def test_targets_are_exact_where_endings_would_say_too_much(self, tmp_path):
        model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
        add_lora(model, 2, r"0|1\.1", rank_pattern={"^0": 1})
        config = self.saved(model, tmp_path)
        assert config["target_modules"] == r"0|1\.1"
        again = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
        again.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" not in k})
        assert {layer.name: layer.r for layer in load_adapter(again, tmp_path).layers} == {"0": 1, "1.1": 2}

    def test_patterns_do_not_fit_longer_names_with_the_same_ending(self, tmp_path):
        peft = pytest.importorskip("peft")

        def nested() -> nn.Module:
            torch.manual_seed(2)
            return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))

        model, x = nested(), torch.randn(3, 4)
        add_lora(model, 2, rank_pattern={"^0": 1}, alpha_pattern={"^0": 3})
        disturb(model)
        save_adapter(model, tmp_path)
        again = nested()
        assert {layer.name: layer.r for layer in load_adapter(again, tmp_path).layers} == {"0": 1, "1.0": 2, "1.1": 2}
        assert torch.equal(again(x), model(x))
        assert torch.allclose(peft.PeftModel.from_pretrained(nested(), tmp_path)(x), model(x), atol=1e-5)

    def test_scaling_set_by_hand_and_mixed_rules_survive(self, tmp_path):
        model = base_model()
        model.first = FusedLoRALinear.from_linear(model.first, 3, lora_alpha=5, use_rslora=True)
        model.second = FusedLoRALinear.from_linear(model.second, 2, lora_alpha=5)
        model.second.scaling = 0.3
        disturb(model)
        save_adapter(model, tmp_path)
        again = base_model()
        load_adapter(again, tmp_path)
        assert math.isclose(again.first.scaling, model.first.scaling, rel_tol=1e-15)
        assert math.isclose(again.second.scaling, 0.3, rel_tol=1e-15)

    def test_layers_take_over_what_the_file_says(self, tmp_path):
        write_folder(tmp_path, good_config(lora_alpha=7, lora_dropout=0.25, use_rslora=True))
        model = base_model()
        add_lora(model, 2, lora_alpha=1)
        matrices = [model.first.lora_A, model.first.lora_B]
        load_adapter(model, tmp_path)
        assert model.first.scaling == 7 / 2**0.5
        assert (model.first.lora_alpha, model.first.use_rslora, model.first.lora_dropout) == (7, True, 0.25)
        assert model.first.lora_A is matrices[0]  # an optimiser that holds them goes on training the right ones
        assert model.first.lora_B is matrices[1]


class TestWrapped:
    def test_compiled_models_are_saved_and_loaded_under_clean_names(self, tmp_path):
        model = base_model()
        add_lora(model, 2)
        disturb(model)
        model.second = torch.compile(model.second, backend="eager")
        save_adapter(torch.compile(model, backend="eager"), tmp_path)
        assert set(load_file(tmp_path / WEIGHTS)) == set(good_tensors())
        again = torch.compile(base_model(), backend="eager")
        load_adapter(again, tmp_path)
        x = torch.randn(3, 6)
        assert torch.allclose(again(x), model(x))

    def test_ddp(self, tmp_path):
        store = f"file://{tmp_path}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        try:
            model = base_model()
            add_lora(model, 2)
            disturb(model)
            wrapped = nn.parallel.DistributedDataParallel(model)
            save_adapter(wrapped, tmp_path / "a")
            assert set(load_file(tmp_path / "a" / WEIGHTS)) == set(good_tensors())
            write_folder(tmp_path / "b")
            load_adapter(wrapped, tmp_path / "b")
            assert torch.equal(model.first.lora_A, good_tensors()[A])
            plain = nn.parallel.DistributedDataParallel(base_model())
            assert_unchanged = snapshot(plain)
            with pytest.raises(ValueError, match="DistributedDataParallel wraps the model"):
                load_adapter(plain, tmp_path / "b")
            assert_unchanged()
        finally:
            torch.distributed.destroy_process_group()

    def test_fsdp2(self, tmp_path):
        """Sharded parameters are gathered for the file; loading into them is refused."""
        from torch.distributed.fsdp import fully_shard

        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            mesh = torch.distributed.init_device_mesh("cpu", (1,))
            model = base_model()
            load_adapter(model, write_folder(tmp_path / "good"))
            for layer in (model.first, model.second, model):
                fully_shard(layer, mesh=mesh)
            save_adapter(model, tmp_path / "saved")
            saved = load_file(tmp_path / "saved" / WEIGHTS)
            assert all(torch.equal(saved[key], value) for key, value in good_tensors().items())
            with pytest.raises(ValueError, match="first of the model is sharded"):
                load_adapter(model, tmp_path / "saved")
            with pytest.raises(ValueError, match="FSDPModule wraps the model"):
                add_lora(model, 2)
        finally:
            torch.distributed.destroy_process_group()

    def test_peft_saved_a_compiled_model(self, tmp_path):
        peft = pytest.importorskip("peft")
        theirs = peft.get_peft_model(base_model(), peft.LoraConfig(r=2, target_modules=["first"]))
        disturb(theirs)
        state = {f"_orig_mod.{key}": value for key, value in peft.get_peft_model_state_dict(theirs).items()}
        theirs.save_pretrained(tmp_path)
        save_file(state, tmp_path / WEIGHTS)
        model, x = base_model(), torch.randn(3, 6)
        load_adapter(model, tmp_path)
        assert torch.allclose(model(x), theirs(x), atol=1e-6)

    def test_only_the_main_process_writes(self, tmp_path):
        model = base_model()
        add_lora(model, 2)
        save_adapter(model, tmp_path / "new", is_main_process=False)
        assert not (tmp_path / "new").exists()


class TestShared:
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(9)
            self.one = nn.Linear(4, 4)
            self.two = self.one

        def forward(self, x):
            return self.two(self.one(x))

    def test_round_trip(self, tmp_path):
        model = self.Twice()
        add_lora(model, 2)
        disturb(model)
        save_adapter(model, tmp_path)
        assert {key.split(".")[2] for key in load_file(tmp_path / WEIGHTS)} == {"one", "two"}
        again, x = self.Twice(), torch.randn(3, 4)
        load_adapter(again, tmp_path)
        assert again.one is again.two
        assert torch.equal(again(x), model(x))

    def test_adapter_for_one_of_its_uses_is_refused(self, tmp_path):
        """PEFT replaces a shared module under its first name only, so its adapter means something else."""
        peft = pytest.importorskip("peft")
        peft.get_peft_model(self.Twice(), peft.LoraConfig(r=2, target_modules=["one", "two"])).save_pretrained(tmp_path)
        model = self.Twice()
        assert_unchanged = snapshot(model)
        with pytest.raises(ValueError, match=r"no tensors for two \(the same layer as one\)"):
            load_adapter(model, tmp_path)
        assert_unchanged()

    def test_uses_that_differ_are_refused(self, tmp_path):
        config = good_config(target_modules=["one", "two"])
        tensors = {
            f"base_model.model.{name}.{matrix}.weight": torch.full(shape, value)
            for name, value in (("one", 1.0), ("two", 2.0))
            for matrix, shape in (("lora_A", (2, 4)), ("lora_B", (4, 2)))
        }
        model = self.Twice()
        assert_unchanged = snapshot(model)
        with pytest.raises(ValueError, match="two differs from one"):
            load_adapter(model, write_folder(tmp_path, config, tensors))
        assert_unchanged()


def adapted() -> nn.Module:
    model = base_model()
    add_lora(model, 2)
    disturb(model)
    return model


class TestSaveRefuses:
    def test_no_adapters(self, tmp_path):
        with pytest.raises(ValueError, match="no FusedLoRALinear"):
            save_adapter(base_model(), tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_non_finite_leaves_the_old_adapter(self, tmp_path):
        model = adapted()
        save_adapter(model, tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with torch.no_grad():
            model.second.lora_B[0, 0] = math.nan
        with pytest.raises(ValueError, match="lora_B of second"):
            save_adapter(model, tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    @pytest.mark.parametrize("name", ["/absolute", "../up", "a/b", ""])
    def test_names_that_leave(self, tmp_path, name):
        with pytest.raises(ValueError, match="adapter_name"):
            save_adapter(adapted(), tmp_path / "new", adapter_name=name)
        with pytest.raises(ValueError, match="adapter_name"):
            load_adapter(base_model(), tmp_path, adapter_name=name)
        assert not (tmp_path / "new").exists()

    def test_partitioned_parameters(self, tmp_path):
        model = adapted()
        model.first.lora_A.data = torch.empty(0)  # what ZeRO-3 leaves in place of a parameter
        with pytest.raises(ValueError, match="first holds a part"):
            save_adapter(model, tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_meta(self, tmp_path):
        with pytest.raises(ValueError, match="first is on the meta device"):
            save_adapter(adapted().to("meta"), tmp_path / "new")


def test_merged_model_is_saved_as_adapters(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path / "before")
    merge_adapter(model)
    save_adapter(model, tmp_path / "merged")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()


def test_savers_at_the_same_time_leave_one_whole_adapter(tmp_path):
    models = [adapted() for _ in range(4)]
    for i, model in enumerate(models):
        with torch.no_grad():
            model.first.lora_B.fill_(i)
    threads = [threading.Thread(target=save_adapter, args=(model, tmp_path)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    model = base_model()
    load_adapter(model, tmp_path)
    assert model.first.lora_B.unique().item() in range(4)
