"""An `NF4Weight` from bitsandbytes' `Params4bit` and back, over the same memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_kernels.checks import check_blocksize, check_nf4
from peft_kernels.formats.nf4 import NESTED_BLOCKSIZE, NF4Weight, code
from peft_kernels.formats.nf4_state import stored

_NAME = "from_bitsandbytes"


def from_bitsandbytes(params: Any) -> NF4Weight:
    """The weight of a `bitsandbytes.nn.Params4bit`, or of a layer that holds one, sharing its memory.

    Args:
        params: quantised to NF4, with any `quant_storage`; a `Linear4bit` stands for its weight.

    Returns:
        An `NF4Weight` on the same device. Writing to the tensors of either changes both.

    Raises:
        TypeError: params is no 4-bit parameter, or its scales are not of the format's dtypes.
        ValueError: it is not quantised yet, of another format than NF4, repacked for bitsandbytes' CPU inference, or a
            tensor of it is too short for its shape.
    """
    params, state = _with_state(params)
    if state is None:
        raise ValueError(f"{_NAME}: params is not quantised yet; bitsandbytes does that when it moves to a device")
    if state.quant_type != "nf4":
        raise ValueError(f"{_NAME}: quant_type is {state.quant_type!r}; expected 'nf4'")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            f"{_NAME}: params is repacked for bitsandbytes' inference on a CPU; take it before the layer is evaluated, "
            "or from its state_dict()"
        )
    check_blocksize(_NAME, "blocksize", state.blocksize)
    # Past the parameter's own __torch_function__: a plain tensor over the same bytes.
    with torch._C.DisableTorchFunctionSubclass():
        data = params.data  # of which torch.compile makes a plain tensor too
    packed = data.contiguous().reshape(-1).view(torch.uint8)
    nested: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if state.nested:
        inner = state.state2
        if inner.blocksize != NESTED_BLOCKSIZE:
            raise ValueError(f"{_NAME}: nested blocksize is {inner.blocksize}; expected {NESTED_BLOCKSIZE}")
        nested = (inner.absmax, inner.code, state.offset)
    q = NF4Weight(packed, state.absmax, *nested, torch.Size(state.shape), state.dtype, state.blocksize)
    check_nf4(_NAME, "params", q)
    return q


def _with_state(params: Any) -> tuple[Any, Any]:
    """(the parameter, its quantisation state or None)."""
    kept = None
    if isinstance(params, torch.nn.Module):
        # FSDP puts plain parameters in the place of a layer's; the layer itself keeps the state.
        kept, params = getattr(params, "quant_state", None), getattr(params, "weight", None)
    if isinstance(params, NF4Weight) or (kept is None and not hasattr(params, "quant_state")):
        raise TypeError(f"{_NAME}: params is {type(params).__name__}; expected a bitsandbytes.nn.Params4bit")
    state = getattr(params, "quant_state", None)
    return params, kept if state is None else state


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
    # A copy: safetensors refuses tensors that share memory, and bitsandbytes saves this one as it is.
    state = QuantState(
        absmax=q.absmax, shape=q.shape, code=code(q.device).clone(), blocksize=q.blocksize, quant_type="nf4",
        dtype=q.dtype, offset=q.nested_offset, state2=inner,
    )  # fmt: skip
    return Params4bit(
        stored(q, quant_storage), requires_grad=False, quant_state=state, blocksize=q.blocksize,
        compress_statistics=q.is_nested, quant_type="nf4", quant_storage=quant_storage, bnb_quantized=True,
    )  # fmt: skip
