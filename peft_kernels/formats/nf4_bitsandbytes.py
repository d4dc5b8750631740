"""An `NF4Weight` from bitsandbytes' `Params4bit` and back, over the same memory."""

from __future__ import annotations

from typing import Any

import torch

from peft_kernels.formats.nf4 import BLOCKSIZES, NESTED_BLOCKSIZE, NF4Weight, code
from peft_kernels.formats.nf4_state import stored


def from_bitsandbytes(params: Any) -> NF4Weight:
    """The weight of a `bitsandbytes.nn.Params4bit`, or of a layer that holds one, sharing its memory.

    Args:
        params: quantised to NF4, with any `quant_storage`; a `Linear4bit` stands for its weight.

    Returns:
        An `NF4Weight` on the same device. Writing to the tensors of either changes both.

    Raises:
        TypeError: params is no 4-bit parameter.
        ValueError: it is not quantised yet, of another format than NF4, or repacked for bitsandbytes' CPU inference.
    """
    name = "from_bitsandbytes"
    if isinstance(params, torch.nn.Module):
        params = params.weight
    if not hasattr(params, "quant_state"):
        raise TypeError(f"{name}: params is {type(params).__name__}; expected a bitsandbytes.nn.Params4bit")
    state = params.quant_state
    if state is None:
        raise ValueError(f"{name}: params is not quantised yet; bitsandbytes does that when it is moved to a device")
    if state.quant_type != "nf4":
        raise ValueError(f"{name}: quant_type is {state.quant_type!r}; expected 'nf4'")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            f"{name}: params is repacked for bitsandbytes' inference on a CPU; call .train() before eval()"
        )
    if state.blocksize not in BLOCKSIZES:
        raise ValueError(f"{name}: blocksize is {state.blocksize}; expected one of {', '.join(map(str, BLOCKSIZES))}")
    # Past the parameter's own __torch_function__: a plain tensor over the same bytes.
    with torch._C.DisableTorchFunctionSubclass():
        data = params.data  # of which torch.compile makes a plain tensor too
    packed = data.contiguous().reshape(-1).view(torch.uint8)
    nested = (None, None, None)
    if state.nested:
        inner = state.state2
        if inner.blocksize != NESTED_BLOCKSIZE:
            raise ValueError(f"{name}: nested blocksize is {inner.blocksize}; expected {NESTED_BLOCKSIZE}")
        nested = (inner.absmax, inner.code, state.offset)
    return NF4Weight(packed, state.absmax, *nested, torch.Size(state.shape), state.dtype, state.blocksize)


def to_bitsandbytes(q: NF4Weight, quant_storage: torch.dtype = torch.uint8) -> Any:
    """The weight as a `bitsandbytes.nn.Params4bit`, sharing its memory.

    Args:
        q: a whole weight, no view of a part.
        quant_storage: what its bytes are shown as: uint8, bfloat16, float16 or float32.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError, TypeError: as for `to_state`.
    """
    try:
        from bitsandbytes.functional import QuantState
        from bitsandbytes.nn import Params4bit
    except ImportError as error:
        raise ImportError('to_bitsandbytes needs bitsandbytes: pip install "peft-kernels[bnb]"') from error
    inner = None
    if q.is_nested:
        inner = QuantState(absmax=q.nested_absmax, blocksize=NESTED_BLOCKSIZE, code=q.nested_map, dtype=torch.float32)
    state = QuantState(
        absmax=q.absmax, shape=q.shape, code=code(q.device).clone(), blocksize=q.blocksize, quant_type="nf4",
        dtype=q.dtype, offset=q.nested_offset, state2=inner,
    )  # fmt: skip
    return Params4bit(
        stored(q, quant_storage), requires_grad=False, quant_state=state, blocksize=q.blocksize,
        compress_statistics=q.is_nested, quant_type="nf4", quant_storage=quant_storage, bnb_quantized=True,
    )  # fmt: skip
