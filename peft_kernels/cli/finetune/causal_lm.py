"""Task "causal-lm": a language model learns texts, or completions after their prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peft_kernels.cli.errors import UsageError
from peft_kernels.cli.finetune.data import Example

IGNORED = -100
EVALUATION_BATCH = 16


class CausalLMTask:
    """Next-token cross entropy; of a (prompt, completion) only the completion's tokens count."""

    metrics: tuple[str, ...] = ("held_out_loss", "perplexity")
    peft_task_type = "CAUSAL_LM"

    def __init__(self, tokenizer, device: torch.device, max_length: int) -> None:
        if tokenizer.eos_token_id is None:
            raise UsageError("--task causal-lm: the model's tokenizer has no end-of-text token")
        self.tokenizer, self.device, self.max_length = tokenizer, device, max_length

    def _tokens(self, example: Example) -> tuple[list[int], list[int]]:
        """Token ids, and labels that ignore the prompt. What is too long loses the end of its text or completion, then
        the start of its prompt."""
        eos = self.tokenizer.eos_token_id
        prompt = self._ids(example[0], special=True) if len(example) == 2 else []
        target = self._ids(example[-1], special=not prompt)
        target = [*target, eos][: self.max_length - (1 if prompt else 0)]
        prompt = prompt[-(self.max_length - len(target)) :] if prompt else []
        return prompt + target, [IGNORED] * len(prompt) + target

    def _ids(self, text: str, special: bool) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        rows = [self._tokens(example) for example in examples]
        width = max(len(ids) for ids, _ in rows)
        filler = self.tokenizer.eos_token_id  # any id: the attention mask hides it
        columns = {
            "input_ids": [ids + [filler] * (width - len(ids)) for ids, _ in rows],
            "attention_mask": [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows],
            "labels": [labels + [IGNORED] * (width - len(labels)) for _, labels in rows],
        }
        return {name: torch.tensor(values, device=self.device) for name, values in columns.items()}

    def loss(self, model: nn.Module, batch) -> Tensor:
        return model(**batch).loss

    def count_tokens(self, batch) -> int:
        return batch["input_ids"].numel()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
        """Mean loss per predicted token (nats) and its exponential, over all examples."""
        total, count = 0.0, 0
        for start in range(0, len(examples), EVALUATION_BATCH):
            batch = self.batch(examples[start : start + EVALUATION_BATCH])
            tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
            if tokens:
                total, count = total + float(self.loss(model, batch)) * tokens, count + tokens
        loss = total / max(1, count)
        return {"held_out_loss": loss, "perplexity": math.exp(min(loss, 700.0))}
