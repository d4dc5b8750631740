"""`FusedLoRAEmbedding`: a frozen embedding table with a trained low-rank update, in the place of `nn.Embedding`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels.checks import check_floating, check_rank
from peft_kernels.functional.lora_embedding import lora_embedding
from peft_kernels.nn._layers import check_flags, resolve_adapter_dtype, scaling_of
from peft_kernels.nn._merge import Mergeable, rounded

_NAME = "FusedLoRAEmbedding"


class FusedLoRAEmbedding(Mergeable):
    """y = W[input] + scaling · A[:, input]ᵀ Bᵀ with frozen W, computed by `functional.lora_embedding`.

    A starts at zero and B normal, as in Hugging Face PEFT, so that the table first equals the frozen one. As there, the
    update has no dropout.

    Args:
        num_embeddings: V, the number of rows.
        embedding_dim: D, the size of a row.
        r: rank of the update, 1 <= r <= 512.
        padding_idx: a row that gets no gradient, or None.
        lora_alpha: scaling = lora_alpha / r (lora_alpha / sqrt(r) with `use_rslora`).
        use_rslora: rank-stabilised scaling (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
        device: device of all parameters.
        dtype: dtype of W; the default dtype when None.
        adapter_dtype: dtype of A and B. None means float32 where `dtype` has 16 bits, else `dtype`.

    Attributes:
        weight: [num_embeddings, embedding_dim], frozen.
        lora_embedding_A: [r, num_embeddings], trained.
        lora_embedding_B: [embedding_dim, r], trained.
        scaling: the factor of the update.
        merged: whether `weight` currently includes the update.

    Raises:
        ValueError: r outside 1..512, a non-finite alpha, a padding_idx outside the table.
        TypeError: a number of the wrong type, or an integer dtype.
    """

    weight: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 8,
        *,
        padding_idx: int | None = None,
        lora_alpha: float = 16,
        use_rslora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"{_NAME}: padding_idx is {padding_idx}; expected a row of the {num_embeddings}")
        base = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self._set_up(base, r, lora_alpha, use_rslora, adapter_dtype)

    def _set_up(self, base: nn.Embedding, r, lora_alpha, use_rslora, adapter_dtype) -> None:
        weight: Any = base.weight
        check_floating(_NAME, "weight", weight)
        check_rank(_NAME, "r", r)
        check_flags(_NAME, has_bias=False, use_rslora=use_rslora)
        options: dict[str, Any] = {
            "device": weight.device,
            "dtype": resolve_adapter_dtype(_NAME, weight, adapter_dtype),
        }
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx, self.r = base.padding_idx, r
        self._set_scaling(lora_alpha, use_rslora)
        self.weight = weight.requires_grad_(False)
        self.lora_embedding_A = nn.Parameter(torch.empty(r, self.num_embeddings, **options))
        self.lora_embedding_B = nn.Parameter(torch.empty(self.embedding_dim, r, **options))
        self._set_aside = {}
        self.reset_lora_parameters()

    def _set_scaling(self, lora_alpha: float, use_rslora: bool) -> None:
        self.scaling = scaling_of(_NAME, lora_alpha, self.r, use_rslora)
        self.lora_alpha, self.use_rslora = lora_alpha, use_rslora

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        r: int = 8,
        *,
        lora_alpha: float = 16,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> FusedLoRAEmbedding:
        """Puts a low-rank update beside an existing table, sharing and freezing its weight.

        Args:
            embedding: an `nn.Embedding`; its padding_idx is taken over.
            r and the others: as for the class.

        Returns:
            A module in the same training mode as `embedding`, with the same `weight`.

        Raises:
            TypeError: `embedding` is none (a subclass may compute something else, so it is refused too), or its weight
                is not floating-point.
            ValueError: it has `max_norm`, `scale_grad_by_freq` or `sparse`, or as for the class.
        """
        if not is_embedding(embedding):
            kind = type(embedding)
            raise TypeError(
                f"{_NAME}.from_embedding: got {kind.__module__}.{kind.__qualname__}; "
                "expected exactly torch.nn.Embedding"
            )
        reason = embedding_objection(embedding)
        if reason is not None:
            raise ValueError(f"{_NAME}.from_embedding: the embedding {reason}")
        table = cls.__new__(cls)
        nn.Module.__init__(table)
        table._set_up(embedding, r, lora_alpha, use_rslora, adapter_dtype)
        return table.train(embedding.training)

    @property
    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """What a file of the adapter holds, by name."""
        return {"lora_embedding_A": self.lora_embedding_A, "lora_embedding_B": self.lora_embedding_B}

    def reset_lora_parameters(self) -> None:
        """A = 0, B ~ N(0, 1): the table, unmerged, equals the frozen one again."""
        self.unmerge()
        if not self.lora_embedding_A.is_meta:
            nn.init.zeros_(self.lora_embedding_A)
            nn.init.normal_(self.lora_embedding_B)

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the adapted table.

        Args:
            input: indices [...], int32 or int64.

        Returns:
            y: [..., embedding_dim] in the weight's dtype.
        """
        if self.merged:
            return F.embedding(input, self.weight, self.padding_idx)
        return lora_embedding(
            input, self.weight, self.lora_embedding_A, self.lora_embedding_B,
            scaling=self.scaling, padding_idx=self.padding_idx,
        )  # fmt: skip

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + scaling · (B A)ᵀ, summed in float32 (float64 for float64 weights) and rounded once to W's dtype.

        Raises:
            ValueError: the sum is not finite.
        """
        base, a, b = self._unmerged("weight"), self.lora_embedding_A, self.lora_embedding_B
        wide = torch.promote_types(base.dtype, torch.float32)
        merged = torch.addmm(base.to(wide), a.to(wide).t(), b.to(wide).t(), alpha=self.scaling)
        return rounded(merged, base.dtype, _NAME)

    def _merged_tensors(self) -> dict[str, Tensor]:
        return {"weight": self.merged_weight()}

    def to_embedding(self) -> nn.Embedding:
        """A new, plain `nn.Embedding` with the merged weight, not requiring gradients.

        Raises:
            ValueError: the merged weight is not finite.
        """
        merged = self.merged_weight()
        return nn.Embedding.from_pretrained(merged, padding_idx=self.padding_idx).train(self.training)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return (
            f"{self.num_embeddings}, {self.embedding_dim}{padding}, r={self.r}, scaling={self.scaling:g}"
            + (", merged" if self.merged else "")
        )  # fmt: skip


def is_embedding(module: nn.Module) -> bool:
    """Whether `from_embedding` takes the module. A subclass may compute something else, so it is none."""
    return type(module) is nn.Embedding


def embedding_objection(embedding: nn.Embedding) -> str | None:
    """Which option of an `nn.Embedding` the low-rank update does not know, or None."""
    if embedding.max_norm is not None:
        return f"has max_norm={embedding.max_norm}, which rewrites its rows; expected None"
    for name in ("scale_grad_by_freq", "sparse"):
        if getattr(embedding, name):
            return f"has {name}=True, which is not supported; expected False"
    return None
