"""`SparseDeltaLinear`: a frozen linear layer of which chosen weights train."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels.checks import check_finite
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.formats.positions import Positions, positions
from peft_kernels.formats.sparse_delta import SparseDelta, added, carried, rows_and_columns
from peft_kernels.functional import sparse_delta_linear
from peft_kernels.nn import _hard_concrete
from peft_kernels.nn._choice import choose
from peft_kernels.nn._layers import resolve_adapter_dtype
from peft_kernels.nn._quantised import Quantised
from peft_kernels.nn._weights import frozen
from peft_kernels.nn.masked import prunable_weight

GATES = (None, "hard_concrete")


class SparseDeltaLinear(Quantised):
    """y = x (W + Δ)ᵀ + b with W and b frozen and Δ at chosen places, computed by `functional.sparse_delta_linear`.

    `values`, Δ's numbers, are 0 at first and all that trains: gradient and optimiser state (`optim.SparseAdamW`) are as
    small as the choice. There is no copy of W, neither here nor in a step.

    With `gate="hard_concrete"` each place has a gate too, which diff pruning (Guo et al. 2020,
    https://arxiv.org/abs/2012.07463) trains to 0 or 1: Δ = values ⊙ z(log_alpha), drawn from torch's generator in
    training mode and fixed in evaluation mode. Add `l0_penalty()` to the loss; `prune_gate` then drops closed places.

    Args:
        in_features: K, the size of x's last dimension.
        out_features: N, the size of y's last dimension.
        bias: whether there is a bias.
        indices: which weights: `Positions`, or a tensor as for `formats.sparse_delta.prepare`; or None.
        density: without `indices`, the part of the weights that train, drawn at random.
        gate: None or "hard_concrete".
        gate_init: log_alpha at first; 5 is open, as in diff pruning.
        values_dtype: of `values`; None takes float32 over 16 bits and W's dtype otherwise.
        device: device of all tensors.
        dtype: dtype of W and b; the default dtype when None.

    Attributes:
        weight: [out_features, in_features], a frozen parameter or an `NF4Weight`.
        bias: [out_features], a frozen parameter, or None.
        values: the parameter [nnz].
        log_alpha: with a gate, the parameter [nnz]; else None.
        indices: the buffer [nnz]: row · in_features + column, ascending. int32, or int64 from 2³¹ weights on.
        merged: whether W holds Δ at the moment.

    Raises:
        ValueError: indices that do not fit, both or neither of `indices` and `density`, an unknown gate.
        TypeError: an argument of the wrong type or dtype.
    """

    weight: Any  # nn.Parameter | NF4Weight
    bias: nn.Parameter | None
    values: nn.Parameter
    log_alpha: nn.Parameter | None
    indices: Tensor
    _overwritten: Tensor | None = None  # W's own numbers at the places while it holds Δ

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        indices: Positions | Tensor | None = None,
        density: float | None = None,
        gate: str | None = None,
        gate_init: float = 5.0,
        values_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        chosen = choose(type(self).__name__, base.weight, indices, density, None, "random", None)
        self._set_up(base.weight, base.bias, chosen, gate, gate_init, values_dtype)

    def _set_up(self, weight, bias, places: Positions, gate, gate_init: float, values_dtype) -> None:
        kind = type(self).__name__
        if gate not in GATES:
            raise ValueError(f"{kind}: gate is {gate!r}; expected None or 'hard_concrete'")
        check_finite(kind, "gate_init", gate_init)
        self.out_features, self.in_features = weight.shape
        self.weight = frozen(weight)
        self.register_parameter("bias", None if bias is None else bias.requires_grad_(False))
        dtype = resolve_adapter_dtype(kind, weight, values_dtype)
        values = torch.zeros(places.flat.shape, dtype=dtype, device=weight.device)
        self.values = nn.Parameter(values)
        log_alpha = nn.Parameter(torch.full_like(values, gate_init)) if gate else None
        self.register_parameter("log_alpha", log_alpha)
        self._put_places(places)

    def _put_places(self, places: Positions) -> None:
        # A copy: loading a state dict writes into the buffer.
        places = places.with_columns()
        self.register_buffer("indices", places.flat.clone())
        self._places = places._replace(flat=self.indices)

    @classmethod
    def from_linear(
        cls,
        linear: Any,
        *,
        indices: Positions | Tensor | None = None,
        density: float | None = None,
        scores: Tensor | None = None,
        selection: str = "random",
        generator: torch.Generator | None = None,
        gate: str | None = None,
        gate_init: float = 5.0,
        values_dtype: torch.dtype | None = None,
    ) -> SparseDeltaLinear:
        """A layer that changes chosen weights of an existing one, whose weight and bias it shares and freezes.

        Args:
            linear: an `nn.Linear`, a transformers `Conv1D` (whose weight is copied), or a layer in 4 bits (`NF4Linear`,
                bitsandbytes' `Linear4bit`).
            indices: which weights; or None.
            density: without `indices`, how large a part of them.
            scores: [out_features, in_features], such as |gradient| (SIFT) or |gradient · W| (SNIP): the largest are
                chosen; with `density`, in the place of `selection`.
            selection: with `density`, "random" or "magnitude", the largest |W|. (SHiRA has both.)
            generator: on the CPU, for "random": one seed chooses the same places on every device and rank.
            gate, gate_init, values_dtype: as for the class.

        Returns:
            A layer in the same training mode as `linear`.

        Raises:
            TypeError: `linear` is none of these (a subclass may compute something else).
            ValueError: as for the class, or scores of another shape or that are NaN.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        weight = prunable_weight(cls.__name__, linear)
        chosen = choose(cls.__name__, weight, indices, density, scores, selection, generator)
        layer._set_up(weight, linear.bias, chosen, gate, gate_init, values_dtype)
        return layer.train(linear.training)

    @property
    def positions(self) -> Positions:
        """The places. They share the module's memory; other places and loading leave them as they were."""
        return self._places

    @property
    def delta(self) -> SparseDelta:
        """Δ as it is in evaluation mode, for `formats.sparse_delta_file.save_deltas`."""
        return SparseDelta(self._places, self._effective(False).detach())

    @property
    def density(self) -> float:
        """The part of the weights that is chosen."""
        return self.values.numel() / max(1, self.out_features * self.in_features)

    def _effective(self, training: bool) -> Tensor:
        if self.log_alpha is None:
            return self.values
        draw = _hard_concrete.sampled if training else _hard_concrete.settled
        return self.values * draw(self.log_alpha)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output.

        Args:
            x: [..., in_features].

        Returns:
            y: [..., out_features] in x's dtype.

        Raises:
            ValueError, TypeError: as `functional.sparse_delta_linear`.
        """
        if self.merged:
            return F.linear(x, self.weight, self.bias)
        return sparse_delta_linear(x, self.weight, self._places, self._effective(self.training), self.bias)

    def l0_penalty(self) -> Tensor:
        """How many places are expected to be open, Σ P(z ≠ 0): a number [] to add to the loss, times λ.

        Raises:
            ValueError: there is no gate.
        """
        return _hard_concrete.probability(self._gate()).sum()

    def _gate(self) -> nn.Parameter:
        if self.log_alpha is None:
            raise ValueError(f"{type(self).__name__}: there is no gate; expected gate='hard_concrete'")
        return self.log_alpha

    @torch.no_grad()
    def prune_gate(self) -> None:
        """Drops the places whose gate is closed in evaluation mode, multiplies the gates of the others into `values`
        and ends with the gate: what the layer computes in evaluation mode stays, bit for bit. `values` is another
        parameter afterwards (diff pruning trains it on with an optimiser of its own).

        Raises:
            ValueError: there is no gate, or the layer is merged.
        """
        self._check_unmerged("prune_gate")
        open_ = _hard_concrete.settled(self._gate()) > 0
        values = self._effective(False)[open_]
        self._put_places(positions(self.indices[open_], self._places.shape))
        self.values = nn.Parameter(values, requires_grad=self.values.requires_grad)
        self.log_alpha = None

    @torch.no_grad()
    def set_positions(self, indices: Positions | Tensor) -> tuple[Positions, Positions]:
        """Takes other places: values of those that stay go with them, new ones start at 0. `values` is another
        parameter afterwards: `SparseAdamW.remap(old, layer.values, *layer.set_positions(...))`.

        Args:
            indices: as for the class.

        Returns:
            (the places before, the places now).

        Raises:
            ValueError: they do not fit, the layer is merged or has a gate; the layer is unchanged.
            TypeError: no places.
        """
        self._check_unmerged("set_positions")
        if self.log_alpha is not None:
            raise ValueError(f"{type(self).__name__}.set_positions: the layer has a gate, which chooses the places")
        old = self._places
        new = choose(type(self).__name__, self.weight, indices, None, None, "random", None)
        values = carried(self.values, old, new)
        self._put_places(new)
        self.values = nn.Parameter(values, requires_grad=self.values.requires_grad)
        return old, self._places

    @torch.no_grad()
    def set_delta(self, delta: SparseDelta) -> None:
        """Takes over the places and values of a delta, such as one that was loaded. `values` is another parameter
        afterwards, in the dtype that it had.

        Raises:
            ValueError: it is of another shape, or the layer is merged or has a gate; the layer is unchanged.
        """
        self._check_unmerged("set_delta")
        if self.log_alpha is not None:
            raise ValueError(f"{type(self).__name__}.set_delta: the layer has a gate, which chooses the places")
        delta = delta.to(self.weight.device)
        places = choose(type(self).__name__, self.weight, delta.positions, None, None, "random", None)
        self._put_places(places)
        values = delta.values.detach().to(self.values.dtype, copy=True)
        self.values = nn.Parameter(values, requires_grad=self.values.requires_grad)

    def _check_unmerged(self, method: str) -> None:
        if self.merged:
            raise ValueError(f"{type(self).__name__}.{method}: the layer is merged; call unmerge first")

    @property
    def merged(self) -> bool:
        return self._overwritten is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Writes W + Δ into W at the places, in place: forward is then a plain linear layer. Twice is harmless. W's own
        numbers are kept, nnz of them, so that `unmerge` puts them back bit for bit. Whoever shares W sees the change.

        Raises:
            ValueError: a merged number would not be finite, or W is of 4 bits, whose grid holds no W + Δ (`to_linear`
                makes a dense layer); the module is unchanged.
        """
        if self.merged:
            return
        kind = type(self).__name__
        if isinstance(self.weight, NF4Weight):
            raise ValueError(
                f"{kind}.merge: W is of 4 bits, which hold no W + Δ; to_linear makes a dense layer of both"
            )
        delta = self.delta
        before = self.weight[rows_and_columns(delta.positions)]
        if not bool(added(before, delta.values, self.weight.dtype).isfinite().all()):
            raise ValueError(f"{kind}.merge: the merged weight is not finite; nothing was changed")
        self._overwritten = delta.apply_(self.weight)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts back what `merge` overwrote, bit for bit. Does nothing on a layer that is not merged."""
        if self._overwritten is not None:
            self.delta.remove_(self.weight, self._overwritten)
            self._overwritten = None

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A new, plain `nn.Linear` with a copy of W + Δ, rounded once, and of the bias, not requiring gradients. Of 4
        bits in the dtype that was quantised."""
        whole = self.weight.dequantize() if isinstance(self.weight, NF4Weight) else self.weight.detach().clone()
        if not self.merged:
            self.delta.apply_(whole)
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = nn.Parameter(whole, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(whole.dtype, copy=True), requires_grad=False)
        return linear.train(self.training)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        order = self._places.order
        self._places = self._places._replace(flat=self.indices, order=None if order is None else fn(order))
        if self._overwritten is not None:
            self._overwritten = fn(self._overwritten)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._overwritten is not None:
            # A checkpoint holds W itself: one with the merged weight would apply Δ twice when loaded.
            whole = self.weight.detach().clone()
            self.delta.remove_(whole, self._overwritten)
            destination[f"{prefix}weight"] = whole

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        # What is loaded is W and Δ; a merged layer is merged again from them.
        loaded, merged = state_dict.get(f"{prefix}indices"), self.merged
        try:
            if loaded is not None:
                positions(loaded, self._places.shape)
        except (ValueError, TypeError) as error:
            error_msgs.append(f"{prefix}indices: {error}")  # before anything of this module is changed
            return
        if loaded is not None and self.indices.is_meta and not local_metadata.get("assign_to_params_buffers", False):
            error_msgs.append(
                f"{prefix}indices is on the meta device; expected assign=True, or to_empty before loading"
            )
            return
        self.unmerge()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if loaded is not None:
            self._put_places(positions(self.indices, self._places.shape))
        if merged:
            self.merge()

    def extra_repr(self) -> str:
        gate = "" if self.log_alpha is None else ", gate='hard_concrete'"
        merged = ", merged" if self.merged else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"places={self.values.numel()}, density={self.density:.4g}, sparsity={1 - self.density:.4g}{gate}{merged}"
            + (self._quantised_repr() if isinstance(self.weight, NF4Weight) else "")
        )
