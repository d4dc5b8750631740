"""`peft-kernels finetune`: trains a real pretrained model through FusedLoRALinear, beside stock PEFT when asked."""

from __future__ import annotations

import argparse

from peft_kernels.cli.errors import name_list, positive_float, positive_int, probability, rank, require_packages
from peft_kernels.cli.finetune.data import CAUSAL_LM, EMBEDDING

SUMMARY = "fine-tune a pretrained model with fused LoRA layers and show what it brought"

PACKAGES = {"transformers": "transformers", "tqdm": "tqdm", "matplotlib": "matplotlib", "rich": "rich"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    data = parser.add_argument_group("what to train on")
    data.add_argument("--model", help="local folder or hub id (default: the bundled MiniLM-L6 sentence encoder)")
    data.add_argument("--task", choices=(EMBEDDING, CAUSAL_LM), default=EMBEDDING)
    data.add_argument(
        "--data",
        metavar="FILE.jsonl",
        help='one object per line: {"query", "positive"} for embedding, {"text"} or {"prompt", "completion"} for '
        "causal-lm (default: names and docstrings of Python's standard library)",
    )
    data.add_argument("--max-length", type=positive_int, default=128, help="tokens kept of a text")
    training = parser.add_argument_group("how to train")
    training.add_argument("--steps", type=positive_int, default=100)
    training.add_argument("--batch-size", type=positive_int, default=64)
    training.add_argument("--lr", type=positive_float, default=1e-3, help="learning rate of AdamW")
    training.add_argument("--r", type=rank, default=16, help="rank of the adapters")
    training.add_argument("--lora-alpha", type=positive_float, default=32.0)
    training.add_argument("--lora-dropout", type=probability, default=0.0)
    training.add_argument(
        "--target-modules",
        type=name_list,
        metavar="NAME,NAME",
        help="linear layers that get an adapter (default: the usual ones that the model has)",
    )
    training.add_argument("--seed", type=int, default=0, help="of the adapters' start and the order of the batches")
    machine = parser.add_argument_group("where to train")
    machine.add_argument("--device", default="auto", help='"auto", "cpu", "cuda" or "cuda:1"')
    machine.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    machine.add_argument("--threads", type=positive_int, help="CPU threads of PyTorch")
    results = parser.add_argument_group("results")
    results.add_argument("--compare", action="store_true", help="train stock PEFT beside, from the same start")
    results.add_argument(
        "--output", metavar="DIR", default="outputs/finetune", help="folder of the adapter and the plot"
    )
    results.add_argument("--json", metavar="FILE", help="also write the figures to this file")


def run(options: argparse.Namespace) -> int:
    """Trains and saves; the exit code is 0, or 130 after Ctrl-C (what there is by then is saved).

    Raises:
        UsageError: an option does not fit the machine, the model or the data.
        CommandError: the training failed.
    """
    require_packages("finetune", PACKAGES | ({"peft": "peft"} if options.compare else {}), extra="demo")
    # Imported only now: base installations lack these packages, and the other commands do not need them.
    from peft_kernels.cli.finetune.job import run_job

    return run_job(options)
