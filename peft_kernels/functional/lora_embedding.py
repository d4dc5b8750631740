"""`lora_embedding`: an embedding table with a low-rank update."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import ops
from peft_kernels.checks import check_adapter, check_device, check_finite, check_floating, check_shape, check_tensor

_OP = "lora_embedding"


def lora_embedding(
    input: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    padding_idx: int | None = None,
) -> Tensor:
    """Rows of an embedding table with a low-rank update, in the layout of Hugging Face PEFT's `lora.Embedding`.

    y = W[input] + scaling · A[:, input]ᵀ Bᵀ

    Backward keeps the indices only: the rows of A are gathered again. Second derivatives raise RuntimeError.

    Args:
        input: [...] indices into the table, int32 or int64, each in [0, num_embeddings).
        weight: [num_embeddings, embedding_dim]; float32, float16, bfloat16 or float64.
        lora_A: [r, num_embeddings], 1 <= r <= 512, in any of these dtypes.
        lora_B: [embedding_dim, r] in lora_A's dtype.
        scaling: s, usually lora_alpha / r.
        padding_idx: an index whose rows of W and A get no gradient, or None. Negative ones count from the end.

    Returns:
        y: [..., embedding_dim] in weight's dtype.

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument.
        TypeError: an argument is of the wrong type or dtype.
        IndexError: on a CPU, an index is outside the table.
    """
    check_tensor(_OP, "input", input)
    if input.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{_OP}: input has dtype {input.dtype}; expected torch.int32 or torch.int64")
    check_floating(_OP, "weight", weight)
    check_shape(_OP, "weight", weight, ("num_embeddings", "embedding_dim"), "it is a table")
    v, d = weight.shape
    check_adapter(_OP, lora_A, lora_B, (v, "rows"), (d, "columns"))
    for name, tensor in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        check_device(_OP, name, tensor, input.device)
    check_finite(_OP, "scaling", scaling)
    if padding_idx is not None and not -v <= padding_idx < v:
        raise ValueError(f"{_OP}: padding_idx is {padding_idx}; expected an index of one of the {v} rows")
    padding = -1 if padding_idx is None else padding_idx % v
    return ops.lora_embedding.lora_embedding(input, weight, lora_A, lora_B, scaling * 1.0, padding)
