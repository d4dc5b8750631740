"""The steps of one fine-tuning: check, load, train, save, show."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import peft_kernels
from peft_kernels.cli.errors import UsageError
from peft_kernels.cli.finetune import report
from peft_kernels.cli.finetune.causal_lm import CausalLMTask
from peft_kernels.cli.finetune.data import EMBEDDING, Split, load_examples
from peft_kernels.cli.finetune.embedding import EmbeddingTask
from peft_kernels.cli.finetune.model import add_peft_beside, choose_targets, copy_adapters, load_model
from peft_kernels.cli.finetune.plot import save_plot
from peft_kernels.cli.finetune.pruned import prune, save_merged, summary
from peft_kernels.cli.finetune.training import Lane, draw_batches, train
from peft_kernels.formats.peft_adapter import WEIGHTS

METHODS = {"lora": "LoRA", "dora": "DoRA", "qlora": "QLoRA", "pruned": "masked LoRA"}
# Methods that change the weights under the adapters: LoRA over the dense ones is trained beside.
CHANGED_BASE = ("qlora", "pruned")
ADAPTER, PLOT, PRUNED = "adapter", "training.png", "pruned.safetensors"


def run_job(options: argparse.Namespace) -> int:
    device = choose_device(options.device)
    output = _prepare_output(options.output, options.json)
    if options.threads:
        torch.set_num_threads(options.threads)
    data = load_examples(options.task, options.data)
    if len(data.train) < options.batch_size:
        raise UsageError(f"--batch-size {options.batch_size}: there are only {len(data.train)} examples to train on")
    print(f"{len(data.train)} examples to train on, {len(data.held_out)} held out: {data.source}")
    lanes = build_lanes(options, device)
    finished = _train_with_bar(options, lanes, data)
    figures = _save(options, lanes, data, output)
    report.print_table(figures, lanes)
    if "pruned" in figures:
        print(summary(figures["pruned"], output / PRUNED))
    print(f"Adapter in {output / ADAPTER} (PEFT's format), plot in {output / PLOT}")
    if not finished:
        print("Interrupted: the figures are those up to here.", file=sys.stderr)
    return 0 if finished else 130


def choose_device(name: str) -> torch.device:
    """The device to train on; "auto" takes a GPU when there is one.

    Raises:
        UsageError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:<index>")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here")
    return device


def _prepare_output(folder: str, json_file: str | None) -> Path:
    """Makes the folders now: a training must not end in a path that cannot be written."""
    output = Path(folder)
    for wanted in (output, Path(json_file).parent if json_file else output):
        try:
            wanted.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make the folder {wanted}: {error.strerror}") from None
    if json_file and Path(json_file).is_dir():
        raise UsageError(f"--json {json_file}: is a folder; expected a file")
    return output


def build_lanes(options: argparse.Namespace, device: torch.device) -> list[Lane]:
    """Our model; where its base is changed also one with LoRA over the dense weights; with --compare PEFT's, over the
    changed base. All start with equal adapters, each has its optimizer."""
    model, tokenizer = load_model(options.model, options.task, getattr(torch, options.dtype), device)
    targets = choose_targets(model, options.target_modules)
    task_class = EmbeddingTask if options.task == EMBEDDING else CausalLMTask
    positions = getattr(model.config, "max_position_embeddings", options.max_length)
    task = task_class(tokenizer, device, min(options.max_length, tokenizer.model_max_length, positions))
    settings = {
        "r": options.r,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "target_modules": targets,
        "use_dora": options.method == "dora",
    }
    qlora = {"double_quant": options.double_quant} if options.method == "qlora" else None
    dense = copy.deepcopy(model) if options.method in CHANGED_BASE else None
    base: dict[str, Any] = {"base_quantization": "nf4", **qlora} if qlora is not None else {}
    if options.method == "pruned":
        base["masks"] = prune(model, targets, options.sparsity)
    models = [("peft_kernels", METHODS[options.method] if dense is not None else "peft_kernels", model)]
    if options.compare:
        models.append(("peft", "PEFT", add_peft_beside(model, settings, qlora)))
    if dense is not None:
        models.append(("lora", "LoRA", dense))
    for key, _, beside in models:
        torch.manual_seed(options.seed)
        if key == "peft":
            copy_adapters(model, beside)
        else:
            peft_kernels.add_lora(beside, **settings, **(base if beside is model else {}))
    return [Lane.of(key, name, beside, task, options.optim, options.lr) for key, name, beside in models]


def _train_with_bar(options: argparse.Namespace, lanes: Sequence[Lane], data: Split) -> bool:
    from tqdm import tqdm

    batches = draw_batches(data.train, options.batch_size, options.seed)
    # Into a log rather than onto a screen, a line now and then is enough.
    interval = 0.1 if sys.stderr.isatty() else 20
    with tqdm(total=options.steps, unit="step", mininterval=interval, dynamic_ncols=True) as bar:
        return train(lanes, batches, data.held_out, options.steps, _update(bar))


def _update(bar) -> Callable[[Sequence[Lane], str], None]:
    def update(lanes: Sequence[Lane], activity: str) -> None:
        figures: dict[str, str] = {}
        for lane in lanes:
            prefix = "" if lane is lanes[0] else f"{lane.name} "
            if lane.losses:
                figures |= {f"{prefix}loss": f"{lane.losses[-1]:.4f}", f"{prefix}step": f"{lane.seconds[-1]:.3f}s"}
        bar.set_description(activity, refresh=False)
        bar.set_postfix(figures, refresh=False)
        bar.update(len(lanes[0].losses) - bar.n)

    return update


def _save(options: argparse.Namespace, lanes: Sequence[Lane], data: Split, output: Path) -> dict:
    ours = lanes[0]
    peft_kernels.save_adapter(ours.model, output / ADAPTER, task_type=ours.task.peft_task_type)
    rows = ours.task.count_tokens(ours.task.batch(data.train[: options.batch_size]))
    theirs = ("peft", "bitsandbytes") if options.method == "qlora" else ("peft",)
    backends = [
        report.versions(*theirs) if lane.key == "peft" else report.backends_used(lane.model, rows) for lane in lanes
    ]
    facts = {
        "steps": len(ours.losses),
        "steps_asked": options.steps,
        "scores": {str(step): score for step, score in ours.scores.items()},
        "train_examples": len(data.train),
        "held_out_examples": len(data.held_out),
        "data": data.source,
        "device": str(ours.task.device),
        "method": options.method,
        "optim": options.optim,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "seed": options.seed,
    }
    if options.method == "pruned":
        adapter = output / ADAPTER / WEIGHTS
        facts["pruned"] = {"sparsity": options.sparsity} | save_merged(ours.model, output / PRUNED, adapter)
    figures = report.build(lanes, backends, facts)
    config: Any = ours.model.config
    title = f"{config.model_type}, {METHODS[options.method]} r={options.r}: {data.source}"
    save_plot(output / PLOT, lanes, ours.task.metrics[0], title)
    if options.json:
        report.write_json(Path(options.json), figures)
    return figures
