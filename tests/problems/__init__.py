"""Problems of each op: seeded tensors, the library's call, and PyTorch's own composition of the same formula."""

from tests.problems.base import Problem
from tests.problems.dora import DoraProblem
from tests.problems.embedding import EmbeddingProblem
from tests.problems.experts import ExpertProblem
from tests.problems.gated import GatedProblem
from tests.problems.group import GroupProblem
from tests.problems.lora import LoraProblem
from tests.problems.masked import MaskedLoraProblem, MaskedProblem, MultiMaskProblem
from tests.problems.mlp import MlpProblem
from tests.problems.multi import MultiLoraProblem
from tests.problems.multi_experts import MultiExpertProblem
from tests.problems.nf4 import Nf4LoraProblem, Nf4Problem
from tests.problems.sparse import SparseProblem
from tests.problems.sparse_delta import SparseDeltaProblem

# What every implementation takes, unless the device itself is the obstacle.
PLAIN = {
    "lora_linear": lambda device: LoraProblem(32, 64, 64, 16, bias=False, device=device),
    "lora_linear_group": lambda device: GroupProblem(32, 64, (64, 32), ((16,), (16,)), device=device),
    "dora_linear": lambda device: DoraProblem(32, 64, 64, 16, device=device),
    "gated_activation": lambda device: GatedProblem((32, 64), device=device),
    "lora_swiglu_mlp": lambda device: MlpProblem(32, 64, 64, ((16,), (16,), (16,)), device=device),
    "lora_embedding": lambda device: EmbeddingProblem(32, 64, 64, 16, device=device),
    "lora_expert_linear": lambda device: ExpertProblem((16, 16), 64, 64, 16, device=device),
    "multi_lora_linear": lambda device: MultiLoraProblem(32, 64, 64, (16, 16), device=device),
    "multi_lora_expert_linear": lambda device: MultiExpertProblem((16, 16), 64, 64, (16, 16), device=device),
    "nf4_linear": lambda device: Nf4Problem(16, 64, 64, bias=False, device=device),
    "nf4_lora_linear": lambda device: Nf4LoraProblem(16, 64, 64, 16, bias=False, device=device),
    "masked_linear": lambda device: MaskedProblem(32, 64, 64, bias=False, device=device),
    "masked_lora_linear": lambda device: MaskedLoraProblem(32, 64, 64, 16, bias=False, device=device),
    "multi_mask_linear": lambda device: MultiMaskProblem(32, 64, 64, device=device),
    "sparse_delta_linear": lambda device: SparseDeltaProblem(32, 64, 64, bias=False, device=device),
    "sparse_linear": lambda device: SparseProblem(32, 64, 64, bias=False, device=device),
}

__all__ = [
    "PLAIN",
    "DoraProblem",
    "EmbeddingProblem",
    "ExpertProblem",
    "GatedProblem",
    "GroupProblem",
    "LoraProblem",
    "MaskedLoraProblem",
    "MaskedProblem",
    "MlpProblem",
    "MultiExpertProblem",
    "MultiLoraProblem",
    "MultiMaskProblem",
    "Nf4LoraProblem",
    "Nf4Problem",
    "Problem",
    "SparseDeltaProblem",
    "SparseProblem",
]
