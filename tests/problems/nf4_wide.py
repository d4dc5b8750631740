"""Problems of the ops that take weights of 4 bits wherever they take a weight: the problems over dense weights, with
some of these replaced by an `NF4Weight` in the call and by what it decodes to in the composition."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.problems import Draw, nf4_decoded, nf4_weight
from tests.problems.base import Problem
from tests.problems.dora import DoraProblem
from tests.problems.experts import ExpertProblem
from tests.problems.group import GroupProblem
from tests.problems.lora import LoraProblem
from tests.problems.mlp import MlpProblem
from tests.problems.nf4 import part_of


@dataclass(kw_only=True)
class OverNf4(Problem):
    """`kept_dense` names the weights that stay dense. `nf4_dtype` is the dtype that the weights had when they were
    quantised, which products do not look at."""

    blocksize: int = 64
    nested: bool = True
    part: str = "whole"
    nf4_dtype: torch.dtype = torch.float32
    kept_dense: tuple[str, ...] = ()
    qs: dict[str, NF4Weight] = field(init=False, repr=False)
    decoded: dict[str, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [name for name in self.tensors if name.startswith("weight") and name not in self.kept_dense]
        self.qs = {name: self._weight(self.tensors.pop(name).shape, i) for i, name in enumerate(names)}
        self.decoded = {name: nf4_decoded(q, self.dtype) for name, q in self.qs.items()}

    def _weight(self, shape: torch.Size, seed: int) -> NF4Weight:
        options: dict[str, Any] = {"blocksize": self.blocksize, "nested": self.nested, "dtype": self.nf4_dtype}
        if len(shape) == 3:
            return nf4_weight(Draw("cpu", seed), *shape, **options).to(self.device)
        return part_of(self.part, *shape, seed=seed, device=self.device, **options)

    def arguments(self, t):
        return super().arguments({**t, **self.qs})

    def compose(self, t):
        return super().compose({**t, **{name: weight.to(t["x"].dtype) for name, weight in self.decoded.items()}})

    def over_decoded(self) -> dict[str, Any]:
        """The tensors with dense weights, for the same op on what the weights decode to."""
        return {**self.tensors, **self.decoded}

    def absolute(self):
        twin = super().absolute()
        twin.decoded = {name: weight.abs() for name, weight in self.decoded.items()}
        return twin


@dataclass
class LoraOverNf4(OverNf4, LoraProblem):
    """`lora_linear` given an `NF4Weight`."""


@dataclass
class GroupOverNf4(OverNf4, GroupProblem):
    """`lora_linear_group` over weights of 4 bits."""


@dataclass
class DoraOverNf4(OverNf4, DoraProblem):
    """`dora_linear` over a weight of 4 bits. Its norm is that of the weight in the dtype that it had."""

    def norm(self, t) -> Tensor:
        return super().norm({**t, "weight": nf4_decoded(self.qs["weight"], self.nf4_dtype).to(t["x"].dtype)})


@dataclass
class MlpOverNf4(OverNf4, MlpProblem):
    """`lora_swiglu_mlp` over weights of 4 bits."""


@dataclass
class ExpertsOverNf4(OverNf4, ExpertProblem):
    """`lora_expert_linear` over a stack of 4 bits."""
