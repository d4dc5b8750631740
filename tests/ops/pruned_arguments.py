"""Arguments of the registered ops over pruned weights, for `test_schemas`."""

from __future__ import annotations

import torch

from peft_kernels.formats.mask import PackedMask
from peft_kernels.ops._weights import split
from peft_kernels.problems import Draw, nf4_weight
from peft_kernels.problems.pruned import drawn, packed

F32, BF16 = torch.float32, torch.bfloat16
N, K = 70, 31  # two strips of rows; a word that is not full


def mask(seed: int = 1) -> PackedMask:
    return packed(drawn(Draw("cpu", seed), 0.5, N, K))


def weight(dtype=F32, nf4: bool = False):
    """The tensors and the layout of a weight."""
    dense = torch.randn(N, K).to(dtype)
    (first,), others, layout = split((nf4_weight(Draw("cpu"), N, K) if nf4 else dense,))
    return [first, *others], layout


def masked(batch=(3, 5), dtype=F32, weight_dtype=None, nf4=False, clean=False, bias=True):
    x = torch.randn(*batch, K).to(dtype)
    return x, *weight(weight_dtype or dtype, nf4), mask().words, clean, torch.randn(N).to(dtype) if bias else None


def masked_backward(needs=(True, True, True, False), values_dtype=None, **options):
    x, tensors, layout, words, clean, _ = masked(**options)
    grad_y = torch.randn(*x.shape[:-1], N).to(x.dtype)
    kept_x = x if needs[1] or needs[3] else None
    places = mask().positions() if needs[3] else None
    flat, starts = (None, None) if places is None else (places.flat, places.starts)
    return grad_y, kept_x, tensors, layout, words, clean, flat, starts, values_dtype, needs


def lora(batch=(3, 5), adapter_dtype=F32, seed=None, update_masked=True, **options):
    factors = (torch.randn(4, K).to(adapter_dtype), torch.randn(N, 4).to(adapter_dtype))
    dropout = (0.0, None) if seed is None else (0.25, torch.tensor([seed]))
    return *masked(batch, **options), *factors, 1.5, *dropout, update_masked


def lora_backward(needs=(True,) * 4, **options):
    x, tensors, layout, words, clean, _, *others, update_masked = lora(**options)
    grad_y, s = torch.randn(*x.shape[:-1], N).to(x.dtype), torch.randn(*x.shape[:-1], 4).to(x.dtype)
    kept_s = None if update_masked else s
    return grad_y, x, kept_s, tensors, layout, words, clean, *others, update_masked, needs


def multi(batch=(3, 5), dtype=F32, weight_dtype=None):
    x, (dense,), _, _, _, bias = masked(batch, dtype, weight_dtype)
    ids = torch.randint(-1, 3, (x[..., 0].numel(),))
    return x, dense, torch.stack([mask(seed).words for seed in range(3)]), ids, bias


def multi_backward(needs=(True, True, True), **options):
    x, dense, words, ids, _ = multi(**options)
    return torch.randn(*x.shape[:-1], N).to(x.dtype), x if needs[1] else None, dense, words, ids, needs


ARGUMENTS = {
    "mask_pack": [
        (torch.randn(N, K) > 0, None, False),
        (torch.randn(K, N).t(), torch.tensor(0.5), True),
        (torch.randn(N, K).to(BF16), torch.randn(N, 1), False),
        (torch.randn(0, K), None, False),
    ],
    "mask_unpack": [(mask().words, K), (mask().words[:0], K)],
    "mask_apply": [
        (torch.randn(N, K), mask().words, F32),
        (torch.randn(K, N).t(), mask().words, BF16),
        (torch.randn(N, 64)[:, :K], torch.cat((mask().words, mask().words), 1)[:, :1], F32),
    ],
    "mask_apply_": [(torch.randn(N, K), mask().words), (torch.randn(N, K).to(BF16), mask().words)],
    "masked_linear": [
        masked(),
        masked((0,), clean=True),
        masked((), dtype=BF16, weight_dtype=F32, bias=False),
        masked(nf4=True),
    ],
    "masked_linear_backward": [
        masked_backward(),
        masked_backward((False, False, True, True), F32, dtype=BF16),
        masked_backward((True, False, False, True), F32, batch=(0,), clean=True),
        masked_backward((True, True, False, False), dtype=BF16, weight_dtype=F32),
        masked_backward((True, False, True, False), nf4=True),
    ],
    "masked_lora_linear": [
        lora(seed=3),
        lora((0,), update_masked=False),
        lora((), dtype=BF16, clean=True),
        lora(nf4=True, seed=3, update_masked=False),
    ],
    "masked_lora_linear_backward": [
        lora_backward(seed=3),
        lora_backward((False, True, True, False), batch=(0,)),
        lora_backward((True, False, False, True), dtype=BF16, update_masked=False, seed=3),
        lora_backward((True, False, True, True), nf4=True),
    ],
    "multi_mask_linear": [multi(), multi((0,)), multi((), dtype=BF16, weight_dtype=F32)],
    "multi_mask_linear_backward": [
        multi_backward(),
        multi_backward((True, False, True), batch=(0,)),
        multi_backward((False, True, False), dtype=BF16, weight_dtype=F32),
    ],
}
