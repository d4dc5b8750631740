"""Arguments of every registered op, for `test_schemas`."""

from __future__ import annotations

import torch

from peft_kernels.formats.adapter_table import ROW, row
from peft_kernels.ops._weights import split
from peft_kernels.problems import Draw, nf4_weight
from tests.ops import pruned_arguments
from tests.problems.nf4 import part_of
from tests.problems.sparse import SparseProblem
from tests.problems.sparse_delta import SparseDeltaProblem

F32, BF16 = torch.float32, torch.bfloat16

ALL = (True,) * 5


def lora_arguments(batch=(3, 5), dtype=F32, adapter_dtype=F32, seed=None, bias=True, strided=False):
    x = torch.randn(*batch, 31).to(dtype)
    if strided:
        x = torch.randn(*batch[:-1], 31, batch[-1]).to(dtype).transpose(-1, -2)
    weight, vector = torch.randn(17, 31).to(dtype), torch.randn(17).to(dtype) if bias else None
    a, b = torch.randn(4, 31).to(adapter_dtype), torch.randn(17, 4).to(adapter_dtype)
    p = 0.25 if seed is not None else 0.0
    return x, weight, vector, a, b, 1.5, p, None if seed is None else torch.tensor([seed])


def backward_arguments(needs=ALL, **options):
    x, weight, _, a, b, scaling, p, seed = lora_arguments(**options)
    batch, r = x.shape[:-1], a.shape[0]
    grad_y, s = torch.randn(*batch, 17).to(x.dtype), torch.randn(*batch, r).to(x.dtype)
    x = x if needs[1] or needs[3] else None
    return grad_y, x, s if needs[4] else None, weight, a, b, scaling, p, seed, needs


GROUP = [
    torch.randn(8, 31),
    torch.randn(5, 31),
]  # weights of two projections; three adapters, two of them on the second
GROUP_AS, GROUP_BS = [torch.randn(r, 31) for r in (4, 2, 3)], [torch.randn(8, 4), torch.randn(5, 2), torch.randn(5, 3)]
SCALINGS, OUTPUTS, PS = [1.5, 0.5, -2.0], [0, 1, 1], [0.25, 0.0, 0.5]


def group_arguments(batch=(3, 5), dropout=False, mask=False, adapters=3):
    x, biases = torch.randn(*batch, 31), [torch.randn(8), None]
    token_mask = torch.rand(batch) < 0.5 if mask else None
    lists = (GROUP_AS, GROUP_BS, SCALINGS, OUTPUTS, PS if dropout else [0.0] * 3)
    seeds = torch.arange(adapters) if dropout else None
    return x, GROUP, [], biases, *(values[:adapters] for values in lists), seeds, token_mask


def group_backward(batch=(3, 5), unused=False, needs=(True,) * 11, **options):
    x, weights, layouts, _, lora_As, *others = group_arguments(batch, **options)
    grads = [None if unused else torch.randn(*batch, 8), torch.randn(*batch, 5)]
    s = torch.randn(*batch, sum(a.shape[0] for a in lora_As))
    return grads, x, s, weights, layouts, lora_As, *others, needs


def dora_vectors(dtype):
    return torch.rand(17).to(dtype) + 1, torch.rand(17) + 1


def dora_arguments(**options):
    x, weight, bias, a, b, scaling, p, seed = lora_arguments(**options)
    return x, [weight], [], bias, a, b, *dora_vectors(a.dtype), scaling, p, seed


def dora_backward(needs=(True,) * 6, **options):
    grad_y, x, s, weight, a, b, scaling, p, seed, _ = backward_arguments(ALL, **options)
    u = torch.randn_like(grad_y)
    return grad_y, x, s, u, [weight], [], a, b, *dora_vectors(a.dtype), scaling, p, seed, needs


def mlp_arguments(batch=(3, 5), dropout=False):
    x, biases = torch.randn(*batch, 6), [torch.randn(9), None, torch.randn(6)]
    weights = [torch.randn(9, 6), torch.randn(9, 6), torch.randn(6, 9)]
    lora_As, lora_Bs = [torch.randn(2, 6), torch.randn(3, 9)], [torch.randn(9, 2), torch.randn(6, 3)]
    ps, seeds = ([0.25, 0.5], torch.arange(2)) if dropout else ([0.0, 0.0], None)
    return x, weights, [], biases, lora_As, lora_Bs, [1.5, 0.5], [0, 2], "silu", ps, seeds


def mlp_backward(batch=(3, 5), needs=(True,) * 11, **options):
    x, weights, layouts, _, *others = mlp_arguments(batch, **options)
    gate, up = torch.randn(*batch, 9), torch.randn(*batch, 9)
    s, s_down = torch.randn(*batch, 2), torch.randn(*batch, 3)
    return torch.randn(*batch, 6), x, gate, up, s, s_down, weights, layouts, *others, needs


IDS = torch.tensor([[3, 0, 3], [1, 6, 3]])


def embedding_factors(dtype=F32, adapter_dtype=F32):
    return torch.randn(7, 10).to(dtype), torch.randn(4, 7).to(adapter_dtype), torch.randn(10, 4).to(adapter_dtype), 1.5


ENDS = torch.tensor([2, 2, 5], dtype=torch.int32)


def expert_arguments(rows=6, seed=None, dtype=F32, adapter_dtype=F32, bias=True):
    x, weight = torch.randn(rows, 31).to(dtype), torch.randn(3, 17, 31).to(dtype)
    a, b = torch.randn(3, 4, 31).to(adapter_dtype), torch.randn(3, 17, 4).to(adapter_dtype)
    ends = ENDS if rows else torch.zeros_like(ENDS)
    p, seed = (0.0, None) if seed is None else (0.25, torch.tensor([seed]))
    return x, [weight], [], torch.randn(3, 17).to(dtype) if bias else None, a, b, ends, 1.5, p, seed


def expert_backward(needs=ALL, **options):
    x, weight, layout, _, *others = expert_arguments(**options)
    grad_y, s = torch.randn(x.shape[0], 17).to(x.dtype), torch.randn(x.shape[0], 4).to(x.dtype)
    return grad_y, x, s, weight, layout, *others, needs


# Three adapters over the two projections of GROUP: one has nothing in the second.
MULTI_AS = [torch.randn(r, 31) for r in (4, 2, 3, 1, 2)]
MULTI_BS = [torch.randn(n, r) for n, r in ((8, 4), (8, 2), (8, 3), (5, 1), (5, 2))]
MULTI_LISTS = (MULTI_AS, MULTI_BS, [0, 0, 0, 1, 1], [0, 1, 2, 0, 2], [1.5, 0.5, -2.0, 1.0, 3.0], [], [], [4, 2], 3)


def pool_tables():
    """The same adapters in a pool's memory, in a table with a layer more, which comes first."""
    arena, rows = torch.randn(4096), bytearray(ROW.size * 3 * 3)
    place = 0
    for a, b, j, adapter, scaling in zip(*MULTI_LISTS[:5], strict=True):
        lora_A, lora_B = (arena[place + i * 256 :][: t.numel()].view(t.shape) for i, t in enumerate((a, b)))
        ROW.pack_into(rows, (adapter * 3 + 1 + j) * ROW.size, *row(lora_A, lora_B, scaling))
        place += 512
    table = torch.frombuffer(rows, dtype=torch.int64).view(3, 3, 4)
    return [arena], [], [], [], [], [table, table.clone()], [1, 2], [4, 2], 3


POOL = pool_tables()


def multi_arguments(batch=(3, 5), dropout=False, several=False, lists=MULTI_LISTS, keep_s=True):
    x, biases = torch.randn(*batch, 31), [torch.randn(8), None]
    shape = (x[..., 0].numel(), 2 if several else 1)
    ids, mix = torch.randint(-1, 3, shape), torch.randn(shape) if several else None
    ps, seeds = ([0.25, 0.0, 0.5], torch.arange(2)) if dropout else ([], None)
    return x, GROUP, [], biases, *lists, ids, mix, ps, seeds, keep_s


def multi_backward(batch=(3, 5), unused=False, needs=(True,) * 16, **options):
    x, weights, layouts, _, *others, _ = multi_arguments(batch, **options)
    ids, widths = others[-4], others[-6]
    grads = [None if unused else torch.randn(*batch, 8), torch.randn(*batch, 5)]
    return grads, x, [torch.randn(*ids.shape, width) for width in widths], weights, layouts, *others, needs


def multi_expert_arguments(rows=6, dropout=False, several=False, keep_s=True, dtype=F32, adapter_dtype=F32):
    """Three adapters of other ranks, of which one has nothing here."""
    x, weight = torch.randn(rows, 31).to(dtype), torch.randn(3, 17, 31).to(dtype)
    lora_As = [torch.randn(3, r, 31).to(adapter_dtype) for r in (4, 2)]
    lora_Bs = [torch.randn(3, 17, r).to(adapter_dtype) for r in (4, 2)]
    ends, shape = ENDS if rows else torch.zeros_like(ENDS), (rows, 2 if several else 1)
    ids, mix = torch.randint(-1, 3, shape), torch.randn(shape) if several else None
    ps, seed = ([0.25, 0.0, 0.5], torch.tensor([3])) if dropout else ([], None)
    adapters = (lora_As, lora_Bs, [0, 2], [1.5, -0.5], 4, 3)
    return x, [weight], [], 3, torch.randn(3, 17).to(dtype), *adapters, ends, ids, mix, ps, seed, keep_s


def multi_expert_backward(needs=(True,) * 8, **options):
    x, weight, layout, experts, _, *others, _ = multi_expert_arguments(**options)
    grad_y, s = torch.randn(x.shape[0], 17).to(x.dtype), torch.randn(*others[-4].shape, 4).to(x.dtype)
    return grad_y, x, [s], weight, layout, experts, *others, needs


def over_nf4(arguments, weights: int, gradients: tuple = ()):
    """The arguments with every weight, the list at this place that layouts follow, in 4 bits: the first nested, the
    others not; `gradients` are the places of what `needs` says of weights, which then want none."""
    *before, dense, _, last = (*arguments[: weights + 2], arguments[weights + 2 :])
    qs = [nf4_weight(Draw("cpu", j), *w.shape, nested=j == 0) for j, w in enumerate(dense)]
    firsts, others, layouts = split(qs)
    if gradients:
        last = (*last[:-1], tuple(need and j not in gradients for j, need in enumerate(last[-1])))
    return *before, [*firsts, *others], layouts, *last


def nf4_operand(part="whole", **options) -> tuple:
    """The tensors and the layout of a weight [17, 31]."""
    q = part_of(part, 17, 31, **options)
    return q.tensors, q.layout


def nf4_lora_arguments(part="whole", nested=True, **options):
    x, _, *others = lora_arguments(**options)
    return x, *nf4_operand(part, nested=nested), *others


def nf4_lora_backward(needs=(True,) * 4, part="whole", **options):
    grad_y, x, s, _, *others, _ = backward_arguments(ALL, **options)
    return grad_y, x if needs[2] else None, s if needs[3] else None, *nf4_operand(part), *others, needs


def delta_arguments(deltas=None, nf4=False, batch=(3, 5), dtype=F32, columns=True):
    problem = SparseDeltaProblem(batch, 31, 17, dtype=dtype, deltas=deltas, adapter_dtype=F32)
    columnwise = [(p.order, p.column_starts) if columns else (None, None) for p in problem.places]
    places = [part for p, two in zip(problem.places, columnwise, strict=True) for part in (p.flat, p.starts, *two)]
    weight = nf4_operand() if nf4 else ([problem.tensors["weight"].detach()], [])
    values = [t.detach() for name, t in problem.tensors.items() if name.startswith("values")]
    ids = None if deltas is None else problem.ids.flatten()
    x, bias, grad_y = problem.tensors["x"].detach(), problem.tensors["bias"].detach(), problem.grad_y
    return x, *weight, places, values, ids, bias, grad_y


def delta_backward(needs=None, **options):
    x, *operands, _, grad_y = delta_arguments(**options)
    return grad_y, x, *operands, needs or (True,) * (3 + len(operands[-2]))


def sparse_arguments(m=(7,), **options):
    problem = SparseProblem(m, 31, 70, **options)
    weight, bias = problem.weight, problem.tensors["bias"]
    x = problem.tensors["x"].detach()
    return x, weight.tensors, weight.layout, weight.numbers, None if bias is None else bias.detach()


def sparse_backward(needs=(True,) * 3, m=(7,), dtype=F32, **options):
    x, *weight, _ = sparse_arguments(m, dtype=dtype, **options)
    return torch.randn(*x.shape[:-1], 70).to(dtype), x if needs[1] else None, *weight, needs


# Per op, arguments on the CPU without autograd (autograd lives outside the registered op).
ARGUMENTS = {
    "lora_linear": [
        lora_arguments(),
        lora_arguments(batch=()),
        lora_arguments(batch=(0,)),
        lora_arguments(batch=(2, 3, 4), seed=3, bias=False),
        lora_arguments(dtype=BF16, seed=3, strided=True),
        lora_arguments(dtype=F32, adapter_dtype=BF16),
    ],
    "lora_linear_backward": [
        backward_arguments(),
        backward_arguments(batch=()),
        backward_arguments(batch=(0,)),
        backward_arguments(needs=(False, False, False, True, True), seed=3),
        backward_arguments(needs=(True, False, False, False, False), dtype=BF16, seed=3),
        backward_arguments(needs=(False, True, True, False, False), strided=True),
        backward_arguments(dtype=BF16, adapter_dtype=F32),
    ],
    "lora_linear_group": [
        group_arguments(),
        group_arguments(batch=()),
        group_arguments(batch=(0,), dropout=True),
        group_arguments(dropout=True, mask=True),
        group_arguments(adapters=0),
        over_nf4(group_arguments(dropout=True, mask=True), 1),
    ],
    "lora_linear_group_backward": [
        group_backward(),
        group_backward(batch=(7,), unused=True, dropout=True),
        group_backward(dropout=True, mask=True, needs=(False,) * 5 + (True, False, True) + (True,) * 3),
        group_backward(needs=(True, True, False, False, True) + (False,) * 6),
        group_backward(adapters=0, needs=(True,) * 5),
        over_nf4(group_backward(dropout=True, mask=True), 3, gradients=(1, 2)),
        over_nf4(group_backward(unused=True), 3, gradients=(1, 2)),
    ],
    "dora_linear": [
        dora_arguments(),
        dora_arguments(batch=(0,), bias=False),
        dora_arguments(batch=(2, 3, 4), dtype=BF16, adapter_dtype=F32, seed=3),
        dora_arguments(batch=(7, 4), strided=True),
        over_nf4(dora_arguments(dtype=BF16, seed=3), 1),
    ],
    "dora_linear_backward": [
        dora_backward(),
        dora_backward(batch=(), seed=3),
        dora_backward(dtype=BF16, adapter_dtype=F32, seed=3, needs=(True, False, False, True, True, True)),
        dora_backward(needs=(False, False, True, False, False, True)),
        over_nf4(dora_backward(dtype=BF16, seed=3), 4, gradients=(1,)),
    ],
    "dora_weight_norm": [
        ([torch.randn(17, 31)], [], F32, torch.randn(4, 31), torch.randn(17, 4), 1.5, None),
        ([torch.randn(17, 31).to(BF16)], [], BF16, torch.randn(4, 31), torch.randn(17, 4), 1.5, torch.rand(17)),
        ([torch.randn(17, 31).double()], [], torch.float64, torch.randn(4, 31), torch.randn(17, 4), 0.0, None),
        over_nf4(([torch.randn(17, 31)], [], BF16, torch.randn(4, 31), torch.randn(17, 4), 1.5, None), 0),
    ],
    "gated_activation": [
        (torch.randn(3, 5, 7), torch.randn(3, 5, 7), "silu"),
        (torch.randn(5, 7).t(), torch.randn(7, 5), "gelu"),
        (torch.randn(()), torch.randn(()), "gelu_tanh"),
        (torch.randn(0, 4).to(BF16), torch.randn(0, 4).to(BF16), "silu"),
    ],
    "gated_activation_backward": [
        (torch.randn(3, 5, 7), torch.randn(3, 5, 7), torch.randn(3, 5, 7), "gelu"),
        (torch.randn(7, 5).t(), torch.randn(5, 7), torch.randn(7, 5).t(), "silu"),
        (torch.randn(7), torch.randn(7), torch.randn(7), "gelu_tanh"),
        (torch.randn(3, 4).to(BF16), torch.randn(3, 4).to(BF16), torch.randn(3, 4).to(BF16), "silu"),
    ],
    "lora_swiglu_mlp": [
        mlp_arguments(),
        mlp_arguments(batch=(7,), dropout=True),
        mlp_arguments(batch=()),
        over_nf4(mlp_arguments(), 1),
    ],
    "lora_swiglu_mlp_backward": [
        mlp_backward(),
        mlp_backward(batch=(7,), dropout=True),
        mlp_backward(needs=(False,) * 7 + (True, False, False, True)),
        over_nf4(mlp_backward(dropout=True), 6, gradients=(1, 2, 3)),
    ],
    "lora_embedding": [
        (IDS, *embedding_factors()),
        (IDS[0].int(), *embedding_factors(BF16)),
        (IDS[:0], *embedding_factors()),
        (IDS[0, 0], *embedding_factors(F32, BF16)),
    ],
    "lora_embedding_backward": [
        (torch.randn(2, 3, 10), IDS, *embedding_factors(), -1, (True,) * 3),
        (torch.randn(3, 2, 10).to(BF16).transpose(0, 1), IDS, *embedding_factors(BF16), 3, (False, True, True)),
        (torch.randn(0, 3, 10), IDS[:0], *embedding_factors(), -1, (True, False, True)),
    ],
    "lora_expert_linear": [
        expert_arguments(),
        expert_arguments(rows=0, seed=3),
        expert_arguments(dtype=BF16, seed=3, bias=False),
        over_nf4(expert_arguments(seed=3), 1),
    ],
    "lora_expert_linear_backward": [
        expert_backward(),
        expert_backward(rows=0),
        expert_backward(dtype=BF16, seed=3, needs=(True, False, True, True, True)),
        expert_backward(needs=(False, True, False, False, False)),
        over_nf4(expert_backward(seed=3), 3, gradients=(1,)),
    ],
    "multi_lora_linear": [
        multi_arguments(),
        multi_arguments(batch=()),
        multi_arguments(batch=(0,), several=True),
        multi_arguments(dropout=True, several=True),
        multi_arguments(lists=POOL, keep_s=False),
        multi_arguments(lists=([], [], [], [], [], [], [], [1, 1], 3), dropout=True),
        over_nf4(multi_arguments(dropout=True, several=True), 1),
    ],
    "multi_lora_linear_backward": [
        multi_backward(needs=(True, False) + (True,) * 14),
        multi_backward(batch=(7,), unused=True, dropout=True, several=True),
        multi_backward(batch=(0,), several=True),
        multi_backward(dropout=True, needs=(False,) * 6 + (True, False) * 5),
        multi_backward(lists=POOL, several=True, needs=(True,) * 6),
        over_nf4(multi_backward(several=True, unused=True), 3, gradients=(2, 3)),
    ],
    "multi_lora_expert_linear": [
        multi_expert_arguments(),
        multi_expert_arguments(rows=0, dropout=True, several=True),
        multi_expert_arguments(dtype=BF16, dropout=True, keep_s=False),
        over_nf4(multi_expert_arguments(dropout=True, several=True), 1),
    ],
    "multi_lora_expert_linear_backward": [
        multi_expert_backward(several=True),
        multi_expert_backward(rows=0, several=True),
        multi_expert_backward(dtype=BF16, dropout=True, needs=(True, False, False, True) + (True, False) * 2),
        multi_expert_backward(needs=(False, False, True) + (False,) * 5),
        over_nf4(multi_expert_backward(dropout=True, several=True), 3, gradients=(2,)),
    ],
    "nf4_linear": [
        (torch.randn(3, 5, 31), *nf4_operand(), torch.randn(17)),
        (torch.randn(31), *nf4_operand(nested=False), None),
        (torch.randn(0, 31), *nf4_operand("rows"), None),
        (torch.randn(2, 31, 5).to(BF16).transpose(1, 2), *nf4_operand("corner"), torch.randn(17)),
    ],
    "nf4_linear_backward": [
        (torch.randn(3, 5, 17), *nf4_operand()),
        (torch.randn(17), *nf4_operand("expert")),
        (torch.randn(0, 17), *nf4_operand()),
        (torch.randn(2, 17, 5).to(BF16).transpose(1, 2), *nf4_operand("columns")),
    ],
    "nf4_lora_linear": [
        nf4_lora_arguments(),
        nf4_lora_arguments(batch=()),
        nf4_lora_arguments(batch=(0,), nested=False),
        nf4_lora_arguments(dtype=BF16, seed=3, strided=True, part="corner", bias=False),
    ],
    "nf4_lora_linear_backward": [
        nf4_lora_backward(),
        nf4_lora_backward(batch=(0,)),
        nf4_lora_backward(needs=(False, False, True, False), seed=3),
        nf4_lora_backward(needs=(True, True, False, True), dtype=BF16, seed=3, strided=True, part="columns"),
    ],
    "nf4_dequantize": [
        (*nf4_operand(), F32),
        (*nf4_operand("columns", nested=False), BF16),
        (*nf4_operand("expert"), torch.float64),
    ],
    "nf4_quantize": [(torch.randn(17, 31), 64), (torch.randn(31, 17).to(BF16).t(), 4096), (torch.randn(0, 4), 32)],
    "sparse_delta_linear": [
        delta_arguments()[:-1],
        delta_arguments(deltas=3, batch=(5,), dtype=BF16)[:-1],
        delta_arguments(nf4=True, batch=(0,))[:-1],
    ],
    "sparse_delta_linear_backward": [
        delta_backward(),
        delta_backward(deltas=3, dtype=BF16),
        delta_backward(nf4=True, batch=(0,), needs=(True, False, False, True)),
        delta_backward(deltas=2, columns=False, needs=(True, False, True, False, True)),
    ],
    "sparse_linear": [
        sparse_arguments(),
        sparse_arguments(layout="2:4", m=(), dtype=BF16),
        sparse_arguments(layout="bitmap", m=(0,), bias=False),
        sparse_arguments(layout="csr", m=(2, 3)),
        sparse_arguments(nf4=True, m=(3, 5)),
    ],
    "sparse_linear_backward": [
        sparse_backward(),
        sparse_backward(needs=(False, True, False), dtype=BF16),
        sparse_backward(needs=(True, False, True), layout="2:4", m=(3, 5)),
        sparse_backward(needs=(True, False, False), layout="bitmap"),
        sparse_backward(needs=(True, False, True), layout="csr"),
        sparse_backward(needs=(True, False, True), nf4=True, m=(0,)),
    ],
    "philox_dropout": [
        (torch.randn(5, 33), 0.3, torch.tensor([1]), 0),
        (torch.randn(2, 3, 16).transpose(0, 1), 0.3, torch.tensor([1]), 4),
        (torch.randn(0, 16), 0.3, torch.tensor([1]), 0),
        (torch.randn(7).bfloat16(), 0.0, torch.tensor([1]), 0),
    ],
    "splitk_reduce": [
        (torch.randn(4, 5, 6), 2.0, BF16),
        (torch.randn(0, 5), 1.0, F32),
        (torch.randn(5, 4).t(), 1.0, F32),
    ],
}
ARGUMENTS |= pruned_arguments.ARGUMENTS
