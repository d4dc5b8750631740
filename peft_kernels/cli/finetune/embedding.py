"""Task "embedding": a sentence encoder learns that a query and its positive belong together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import starmap

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels.cli.finetune.data import Example

COSINE_SCALE = 20.0
EVALUATION_BATCH = 128


class EmbeddingTask:
    """Mean-pooled sentence embeddings, in-batch negatives (Henderson et al. 2017, https://arxiv.org/abs/1705.00652).

    loss = cross_entropy(20 · cos(q_i, p_j), i): each query is to find its own positive among those of the batch.
    """

    metrics: tuple[str, ...] = ("recall",)
    peft_task_type = "FEATURE_EXTRACTION"

    def __init__(self, tokenizer, device: torch.device, max_length: int) -> None:
        self.tokenizer, self.device, self.max_length = tokenizer, device, max_length

    def _encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        encoded = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return encoded.to(self.device)

    def batch(self, examples: Sequence[Example]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        queries, positives = zip(*examples, strict=True)
        return self._encode(queries), self._encode(positives)

    def loss(self, model: nn.Module, batch) -> Tensor:
        queries, positives = starmap(embed, ((model, half) for half in batch))
        scores = COSINE_SCALE * queries @ positives.t()
        return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))

    def count_tokens(self, batch) -> int:
        return max(half["input_ids"].numel() for half in batch)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
        """recall@1: the share of queries whose nearest positive, among those of all examples, is their own."""
        queries, positives = zip(*examples, strict=True)
        distinct = list(dict.fromkeys(positives))
        index = {text: i for i, text in enumerate(distinct)}
        nearest = (self._embed_all(model, queries) @ self._embed_all(model, distinct).t()).argmax(dim=1)
        own = torch.tensor([index[text] for text in positives], device=nearest.device)
        return {"recall": float((nearest == own).double().mean())}

    def _embed_all(self, model: nn.Module, texts: Sequence[str]) -> Tensor:
        # Texts of like length share a batch: half the padding. The order is undone at the end.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        parts = [order[i : i + EVALUATION_BATCH] for i in range(0, len(order), EVALUATION_BATCH)]
        rows = torch.cat([embed(model, self._encode([texts[i] for i in part])) for part in parts])
        return rows[torch.tensor(order).argsort().to(rows.device)]


def embed(model: nn.Module, encoded: dict[str, Tensor]) -> Tensor:
    """Unit vectors [batch, hidden] in float32: the mean of the last hidden states over the tokens, without padding."""
    hidden = model(**encoded).last_hidden_state.float()
    mask = encoded["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)
