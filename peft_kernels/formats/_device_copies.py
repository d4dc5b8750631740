"""Small tables that the host makes and kernels read, copied to a GPU once for as long as their contents stay the same.

A captured CUDA graph would read the host's memory again at every replay, when it may be gone: while one is captured the
copy must be there already, and then it is kept for good.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor

MOST = 128
"""Copies that are kept, the least recently used being dropped first: a model's layers times a few batches."""


class _Copy(NamedTuple):
    tensor: Tensor
    made: torch.cuda.Event


_copies: OrderedDict[tuple, _Copy] = OrderedDict()
_captured: dict[tuple, _Copy] = {}
_lock = threading.Lock()


def on_device(host: Tensor, contents: bytes, device: torch.device) -> Tensor:
    """`host` on `device`; on a CPU itself. Not to be written to.

    Args:
        host: a small contiguous tensor on the CPU.
        contents: its bytes.
        device: where kernels read it, on the current stream.

    Raises:
        RuntimeError: a CUDA graph is being captured, and there is no copy yet.
    """
    if device.type != "cuda":
        return host.to(device)
    key = (contents, host.dtype, host.shape, device)
    with _lock:
        copy = _captured.get(key) or _copies.get(key)
        if torch.cuda.is_current_stream_capturing():
            return _for_capture(key, copy)
        stream = torch.cuda.current_stream(device)
        if copy is None:
            copy = _Copy(host.pin_memory().to(device, non_blocking=True), torch.cuda.Event())
            copy.made.record(stream)
            _copies[key] = copy
            if len(_copies) > MOST:
                _copies.popitem(last=False)
            return copy.tensor
        if key in _copies:
            _copies.move_to_end(key)
    # Made on another stream perhaps; and its memory may be dropped while this one still reads it.
    stream.wait_event(copy.made)
    copy.tensor.record_stream(stream)
    return copy.tensor


def _for_capture(key: tuple, copy: _Copy | None) -> Tensor:
    if copy is None:
        raise RuntimeError(
            "multi_lora_linear: adapters are used for the first time while a CUDA graph is captured; run the same call "
            "once before (as for any graph), or take an AdapterPool, whose table is on the GPU already"
        )
    _captured[key] = copy
    return copy.tensor
