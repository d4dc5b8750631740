"""Tiny pretrained-looking models with tokenizers, built here, and data in which there is something to learn."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

WORDS = [f"w{i}" for i in range(60)]


def write_lines(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _save_tokenizer(folder: Path) -> int:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<unk>", "<eos>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")
    fast.save_pretrained(folder)
    return len(names)


@pytest.fixture(scope="session")
def docstrings() -> list[tuple[str, str]]:
    """The standard library's pairs, collected once: it takes seconds."""
    from peft_kernels.cli.finetune.docstrings import collect_pairs

    return collect_pairs()


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with dropout in its configuration, as pretrained ones have."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("encoder")
    config = transformers.BertConfig(
        vocab_size=_save_tokenizer(folder), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=64, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3,
        initializer_range=0.2,
    )  # fmt: skip
    transformers.set_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("decoder")
    config = transformers.LlamaConfig(
        vocab_size=_save_tokenizer(folder), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64, eos_token_id=2, pad_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    transformers.set_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A positive holds its query's two words among four that say nothing."""
    draw = random.Random(0)
    records = []
    for _ in range(160):
        query, noise = draw.sample(WORDS[:40], 2), draw.sample(WORDS[40:], 4)
        records.append({"query": " ".join(query), "positive": " ".join(draw.sample(query + noise, 6))})
    return write_lines(tmp_path_factory.mktemp("data") / "pairs.jsonl", records)


@pytest.fixture(scope="session")
def completions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each prompt's word is to be followed by its successor."""
    draw = random.Random(0)
    records = [
        {"prompt": f"w{i} w{j}", "completion": f"w{(i + 1) % 60} w{(j + 1) % 60}"}
        for i, j in ((draw.randrange(60), draw.randrange(60)) for _ in range(200))
    ]
    return write_lines(tmp_path_factory.mktemp("data") / "completions.jsonl", records)
