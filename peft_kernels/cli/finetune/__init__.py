"""`peft-kernels finetune`: trains a real pretrained model through FusedLoRALinear, beside stock PEFT when asked."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from peft_kernels.cli.errors import (
    name_list,
    positive_float,
    positive_int,
    probability,
    rank,
    require_packages,
    text_length,
)
from peft_kernels.cli.finetune.data import CAUSAL_LM, EMBEDDING
from peft_kernels.cli.finetune.optimizers import OPTIMIZERS

SUMMARY = "fine-tune a pretrained model with fused LoRA layers and show what it brought"

PACKAGES = {"transformers": "transformers", "tqdm": "tqdm", "matplotlib": "matplotlib", "rich": "rich"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("what to train on")
    data.add_argument("--model", help="local folder or hub id (default: the bundled MiniLM-L6 sentence encoder)")
    data.add_argument("--task", choices=(EMBEDDING, CAUSAL_LM), default=EMBEDDING, help="default: %(default)s")
    data.add_argument(
        "--data",
        metavar="FILE.jsonl",
        help='one object per line: {"query", "positive"} for embedding, {"text"} or {"prompt", "completion"} for '
        "causal-lm (default: names and docstrings of Python's standard library)",
    )
    _add(data, "--max-length", text_length, 128, "tokens kept of a text")
    training = parser.add_argument_group("how to train")
    _add(training, "--steps", positive_int, 100, "number of steps")
    _add(training, "--batch-size", positive_int, 64, "examples per step")
    _add(training, "--lr", positive_float, 1e-3, "learning rate")
    training.add_argument(
        "--method",
        choices=("lora", "dora", "qlora", "pruned"),
        default="lora",
        help="kind of adapters; qlora keeps the weights under them in 4 bits, pruned sets the smallest of them to 0 "
        "and keeps the updates inside of what is left; both train LoRA over the dense weights beside to show what that "
        "changes (default: %(default)s)",
    )
    _add(training, "--sparsity", probability, 0.5, "pruned: share of each layer's weights that goes")
    training.add_argument(
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="qlora: keep the scales of the 4-bit weights in 8 bits (default: yes)",
    )
    training.add_argument(
        "--optim", choices=tuple(OPTIMIZERS), default="adamw", help="the optimizer (default: %(default)s)"
    )
    _add(training, "--r", rank, 16, "rank of the adapters")
    _add(training, "--lora-alpha", positive_float, 32.0, "the update is scaled by lora_alpha / r")
    _add(training, "--lora-dropout", probability, 0.0, "dropout before the adapters; the base model's own is off")
    training.add_argument(
        "--target-modules",
        type=name_list,
        metavar="NAME,NAME",
        help="linear layers that get an adapter (default: the usual ones that the model has)",
    )
    _add(training, "--seed", int, 0, "of the adapters' start and the order of the batches")
    machine = parser.add_argument_group("where to train")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<index> (default: %(default)s)")
    dtypes = ("float32", "bfloat16", "float16")
    machine.add_argument("--dtype", choices=dtypes, default="float32", help="of the base model (default: %(default)s)")
    machine.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads of PyTorch (default: its own)")
    results = parser.add_argument_group("results")
    results.add_argument("--compare", action="store_true", help="train stock PEFT beside, from the same start")
    results.add_argument(
        "--output",
        metavar="DIR",
        default="outputs/finetune",
        help="folder of the adapter and the plot (default: %(default)s)",
    )
    results.add_argument("--json", metavar="FILE", help="also write the figures to this file")


def _add(group, name: str, kind: Callable, default: object, meaning: str) -> None:
    metavar = "N" if kind in (int, positive_int, rank, text_length) else "X"
    group.add_argument(name, type=kind, default=default, metavar=metavar, help=f"{meaning} (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Trains and saves; the exit code is 0, or 130 after Ctrl-C (what there is by then is saved).

    Raises:
        UsageError: an option does not fit the machine, the model or the data.
        CommandError: the training failed.
    """
    require_packages("finetune", PACKAGES | ({"peft": "peft"} if options.compare else {}), extra="demo")
    if options.optim != "adamw" or (options.method == "qlora" and options.compare):
        require_packages("finetune", {"bitsandbytes": "bitsandbytes"}, extra="bnb")
    # Imported only now: base installations lack these packages, and the other commands do not need them.
    from peft_kernels.cli.finetune.job import run_job

    return run_job(options)
