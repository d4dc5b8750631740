"""`multi_lora_linear` for decoding by csrc/multi_lora_linear.cu: the base products, then one launch in which each token
adds the updates of its own adapters to all of them.

Floor: A and B of each token's adapter once and y twice. Compiled for sm_80, sm_90a and sm_100; never run on a GPU yet
(docs/kernels_many_adapters.md).

Every token reads its adapters for itself: ids need no sorting, and a row has the same bits alone and in a batch. The
launch reads the adapters' table on the device: in a CUDA graph, ids and rows of the table may change between replays. A
row must not change while a launch reads it.
"""

from __future__ import annotations

import torch

from peft_kernels import _native
from peft_kernels.checks import MAX_RANK
from peft_kernels.kernels import _base
from peft_kernels.kernels.composed import multi_lora_linear as composed
from peft_kernels.kernels.cuda._availability import not_an_nvidia_gpu, not_built

# Above, tokens share adapters in most batches, and a kernel that takes the tokens of an adapter together reads each
# adapter once; this one would read them 256 times, longer than a sort takes.
MAX_ROWS = 256
MAX_CHOICES = 8
MAX_PROJECTIONS = 8
X_DTYPES = (torch.float16, torch.bfloat16)
ADAPTER_DTYPES = (None, torch.float32, torch.float16, torch.bfloat16)
_MAX_SIZE = 0x7FFF0000

backward = composed.backward  # of problems that another implementation computed: `unsupported` takes none that train


def unsupported(problem) -> str | None:
    if (reason := not_an_nvidia_gpu(problem)) is not None:
        return reason
    if problem.train or problem.dropout:
        return "does not keep S for gradients, nor drop"
    if problem.dtype not in X_DTYPES:
        return f"computes in float16 and bfloat16, not in {problem.dtype}"
    if problem.adapter_dtype not in ADAPTER_DTYPES:
        return f"for adapters in float32, float16 or bfloat16, not in {problem.adapter_dtype}"
    if problem.m > MAX_ROWS:
        return f"for at most {MAX_ROWS} rows, each of which reads its adapter for itself"
    if problem.per_row > MAX_CHOICES:
        return f"for at most {MAX_CHOICES} adapters a row; these name {problem.per_row}"
    if problem.widths and max(problem.widths) > MAX_RANK:
        return f"for ranks up to {MAX_RANK}"
    if min(problem.m, problem.k, problem.per_row, *problem.ns) == 0:
        return "nothing to compute"
    if max(problem.k, *problem.ns) > _MAX_SIZE:
        return f"a side of a weight is above {_MAX_SIZE}"
    return not_built(problem)


def unproven(problem) -> str | None:
    return "not yet measured on a GPU against the alternatives"


def forward(x, weights, biases, adapters, ids, mix, dropout_ps, seeds, keep_s):
    ys = [_base.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    if adapters.count and adapters.dtype is not None:
        add_updates(ys, x, adapters, ids, mix)
    return ys, []


def add_updates(ys, x, adapters, ids, mix) -> None:
    """y_j += what the adapters of each row add to it: ys [M, N_j], contiguous, x [M, K], ids int64 and mix [M, k]."""
    x = x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()
    table = adapters.table(x.device)
    rows = table.rows.contiguous()
    ids, mix = ids.contiguous(), None if mix is None else mix.float().contiguous()
    projections = [(y.data_ptr(), layer, y.shape[1]) for y, layer in zip(ys, table.layers, strict=True)]
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream(x.device).cuda_stream
        launch = _native.load("_cuda").multi_lora_linear
        for first in range(0, len(projections), MAX_PROJECTIONS):
            launch(
                x.device.index, stream, x.shape[0], x.shape[1], max(adapters.widths), _native.DTYPES[x.dtype],
                _native.DTYPES[adapters.dtype], x.data_ptr(), x.stride(0), ids.shape[1], ids.data_ptr(),
                0 if mix is None else mix.data_ptr(), rows.shape[0], rows.stride(0), rows.data_ptr(),
                projections[first : first + MAX_PROJECTIONS],
            )  # fmt: skip
