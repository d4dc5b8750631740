"""Modules whose weight is an `NF4Weight`: how it is made from a layer, moved, saved, loaded and merged into."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.formats import nf4
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.nn._merge import Mergeable, MergeError, rounded
from peft_kernels.nn._weights import dense_rows, moved, state_of


class Quantised(nn.Module):
    """A module whose `weight` is an `NF4Weight`: 4-bit data that no cast touches and no optimizer sees.

    The weight is a plain attribute, neither a parameter nor a buffer:

    - `.to(device)`, `.cuda()`, `.to_empty()` and `.share_memory()` move it; `.half()`, `.to(dtype)` and the like leave
      it as it is. Copies and pickles have it.
    - `state_dict` has it under the keys of bitsandbytes' `Linear4bit`, and loads its own and theirs with strict=True.
      Loading replaces the weight: an `NF4Weight` is never written to, since others may share it.
    - DistributedDataParallel does not broadcast it, neither at the start nor, as it does with buffers, before every
      forward: load the same checkpoint in every process. FSDP leaves it whole in every process and does not cast it;
      move the module to its device first. `functional_call` and parametrisations do not see it.
    - `torch.compile` takes its tensors as inputs at fixed addresses, as it does parameters.
    """

    weight: NF4Weight | nn.Parameter  # a parameter only while an update is merged into it

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        super()._apply(fn, recurse)
        if isinstance(self.weight, NF4Weight):
            self.weight = moved(self.weight, fn)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if isinstance(self.weight, NF4Weight):
            destination.update(state_of(self.weight, f"{prefix}weight"))

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        if not isinstance(self.weight, NF4Weight):  # of modules over either kind of weight
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            return
        key = f"{prefix}weight"
        try:
            loaded = self._loaded(state_dict, key, local_metadata.get("assign_to_params_buffers", False))
        except (ValueError, TypeError) as error:
            error_msgs.append(str(error))  # before anything of this module is changed
            return
        unexpected: list[str] = []
        errors = len(error_msgs)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs)
        if loaded is None:
            missing_keys.extend([key] if strict else ())
        elif len(error_msgs) == errors:
            self.weight = loaded
        unexpected_keys.extend(name for name in unexpected if name != key and not name.startswith(f"{key}."))

    def _loaded(self, state: Any, key: str, assign: bool) -> NF4Weight | None:
        """The weight that a state dict has under `key`; None where it has none.

        Raises:
            ValueError, TypeError: it does not fit, or is none; the message names the key.
        """
        keys = [name for name in state if name == key or name.startswith(f"{key}.")]
        if not keys:
            return None
        if keys == [key] and state[key].is_floating_point():
            raise ValueError(
                f"{key} is a dense weight of {state[key].dtype}, but {type(self).__name__} holds 4 bits; load it into "
                "the dense layer and quantise that (from_linear, quantize_linears)"
            )
        q = nf4.from_state({name: state[name] for name in keys}, key)
        if q.shape != self.weight.shape:
            raise ValueError(
                f"size mismatch for {key}: shape {tuple(q.shape)} in the checkpoint, {tuple(self.weight.shape)} here"
            )
        if assign:
            return q
        device = self.weight.device
        if device.type == "meta" and q.device.type != "meta":
            warnings.warn(
                f"for {key}: loading into a weight on the meta device does nothing; pass assign=True", stacklevel=2
            )
        return q.with_tensors([tensor.to(device, copy=True) for tensor in q.tensors])

    def _quantised_repr(self) -> str:
        q = self.weight
        if not isinstance(q, NF4Weight):
            return ""
        return f", nf4, blocksize={q.blocksize}, double_quant={q.is_nested}"


def quantised_weights(model: nn.Module) -> list[NF4Weight]:
    """The weights in 4 bits that modules of a model compute with; one that is shared occurs more than once."""
    weights = (module.weight for module in model.modules() if isinstance(module, Quantised))
    return [weight for weight in weights if isinstance(weight, NF4Weight)]


class QuantisedMergeable(Mergeable, Quantised):
    """A module whose update is merged into a 4-bit weight, exactly or into 4 bits again."""

    _merge_error: MergeError | None = None

    @torch.no_grad()
    def merge(self, requantize: bool = False) -> MergeError | None:
        """Folds the update into `weight`. The original is kept aside untouched: `unmerge` restores it bit for bit.

        Args:
            requantize: False replaces the weight by the dense merged one, in the dtype of what was quantised: nothing
                is lost but one rounding, and memory grows by the size of the dense weight. True replaces it by the
                merged weight in 4 bits, with the blocksize of the original: memory stays, and the error of the rounding
                is returned.

        Returns:
            The error that the 4 bits introduce, or None without `requantize`. A module merged the other way is merged
            anew.

        Raises:
            ValueError: a merged value would not be finite; the module is unchanged.
        """
        options = {"requantize": requantize}
        if not isinstance(requantize, bool):
            raise TypeError(f"{type(self).__name__}: requantize is {requantize!r}; expected True or False")
        if self.merged and self._merge_options == options:
            return self._merge_error
        values: dict[str, Tensor | NF4Weight]
        if requantize:
            exact, base = self._merged_sum(), self._unmerged("weight")
            rounded(exact, base.dtype, type(self).__name__)
            q = nf4.quantize(exact, base.blocksize, base.is_nested)._replace(dtype=base.dtype)
            values, error = {"weight": q, **self._merged_vectors()}, merge_error(base, exact, q)
        else:
            values, error = {**self._merged_tensors()}, None
        self.unmerge()
        self._merge_error, self._merge_options = error, options
        self._put_merged(values)
        return error


def merge_error(base: NF4Weight, exact: Tensor, q: NF4Weight) -> MergeError:
    """How far `q` is from `exact`, the sum of `base` and an update. The weights are unpacked piece by piece."""
    matrix = exact.reshape(-1, exact.shape[-1])
    sums = torch.zeros(4, dtype=torch.float64, device=exact.device)
    unpacked = [dense_rows(weight, torch.float32) for weight in (base, q)]
    for (start, stop, before), (_, _, after) in zip(*unpacked, strict=True):
        rows = matrix[start:stop]
        error, update = after.sub_(rows), before.sub_(rows)
        sums[:3] += torch.stack([part.double().square().sum() for part in (error, update, rows)])
        if error.numel():
            sums[3] = torch.maximum(sums[3], error.abs().max())
    error, update, norm, largest = sums.tolist()
    return MergeError(_root_of_ratio(error, norm), _root_of_ratio(error, update), largest)


def _root_of_ratio(a: float, b: float) -> float:
    return math.sqrt(a / b) if b else math.inf if a else 0.0
