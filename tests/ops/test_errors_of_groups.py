"""Bad input to the ops beside `lora_linear`: the right exception before any work, naming the argument."""

from __future__ import annotations

import math

import pytest
import torch

from peft_kernels import functional
from peft_kernels.formats.pool import PoolLayer
from tests.ops.test_errors import refused

NAN, INF = math.nan, math.inf
F16, I64 = torch.float16, torch.int64


def ones(*shape, **options):
    return torch.ones(*shape, **options)


GOOD = {
    "lora_linear": lambda: {
        "x": ones(2, 3, 16), "weight": ones(12, 16), "lora_A": ones(4, 16), "lora_B": ones(12, 4), "bias": ones(12),
        "lora_bias": ones(12), "token_mask": ones(2, 3, dtype=torch.bool), "scaling": 2.0,
    },
    "lora_linear_group": lambda: {
        "x": ones(2, 3, 16), "weights": [ones(12, 16), ones(8, 16)],
        "lora_As": [ones(4, 16), [ones(2, 16), ones(3, 16)]], "lora_Bs": [ones(12, 4), [ones(8, 2), ones(8, 3)]],
        "biases": [ones(12), None], "scalings": [2.0, [1.0, 0.5]],
        "dropout_p": 0.5, "seed": 3, "token_mask": ones(2, 3, dtype=torch.bool),
    },
    "dora_linear": lambda: {
        "x": ones(2, 3, 16), "weight": ones(12, 16), "lora_A": ones(4, 16), "lora_B": ones(12, 4),
        "magnitude": ones(12), "bias": ones(12), "weight_norm": ones(12), "scaling": 2.0, "dropout_p": 0.5, "seed": 3,
    },
    "dora_weight_norm": lambda: {
        "weight": ones(12, 16), "lora_A": ones(4, 16), "lora_B": ones(12, 4), "scaling": 2.0,
        "weight_norm_squared": ones(12),
    },
    "gated_activation": lambda: {"gate": ones(2, 8), "up": ones(2, 8), "activation": "silu"},
    "lora_swiglu_mlp": lambda: {
        "x": ones(2, 16), "weights": [ones(12, 16), ones(12, 16), ones(16, 12)],
        "lora_As": [ones(4, 16), None, ones(4, 12)], "lora_Bs": [ones(12, 4), None, ones(16, 4)],
        "biases": [ones(12), None, ones(16)], "scalings": 1.0, "activation": "gelu", "dropout_p": 0.5, "seed": 3,
    },
    "lora_embedding": lambda: {
        "input": ones(2, 3, dtype=I64), "weight": ones(9, 16), "lora_A": ones(4, 9), "lora_B": ones(16, 4),
        "scaling": 2.0, "padding_idx": 0,
    },
    "lora_expert_linear": lambda: {
        "x": ones(6, 16), "weight": ones(2, 12, 16), "lora_A": ones(2, 4, 16), "lora_B": ones(2, 12, 4),
        "offsets": torch.tensor([2, 6], dtype=torch.int32), "bias": ones(2, 12), "scaling": 2.0, "dropout_p": 0.5,
        "seed": 3,
    },
    "multi_lora_linear": lambda: {
        "x": ones(2, 3, 16), "weight": ones(12, 16), "lora_As": [ones(4, 16), None, ones(2, 16)],
        "lora_Bs": [ones(12, 4), None, ones(12, 2)], "adapter_ids": torch.tensor([[0, 2], [-1, 1]]),
        "scalings": [2.0, None, 0.5], "bias": ones(12), "adapter_weights": ones(2, 2), "dropout_p": [0.5, 0.0, 0.25],
        "seed": 3,
    },
    "multi_lora_expert_linear": lambda: {
        "x": ones(6, 16), "weight": ones(2, 12, 16), "lora_As": [ones(2, 4, 16), None, ones(2, 3, 16)],
        "lora_Bs": [ones(2, 12, 4), None, ones(2, 12, 3)], "offsets": torch.tensor([2, 6], dtype=torch.int32),
        "adapter_ids": torch.tensor([0, 2, -1, 1, 0, 0]), "scalings": [2.0, None, 0.5], "bias": ones(2, 12),
        "dropout_p": 0.5, "seed": 3,
    },
    "multi_lora_linear_group": lambda: {
        "x": ones(2, 3, 16), "weights": [ones(12, 16), ones(8, 16)],
        "lora_As": [[ones(4, 16), ones(2, 16)], [None, ones(3, 16)]],
        "lora_Bs": [[ones(12, 4), ones(12, 2)], [None, ones(8, 3)]], "adapter_ids": torch.tensor([0, 1]),
        "scalings": [2.0, [None, 0.5]], "biases": [ones(12), None], "dropout_p": 0.5, "seed": 3,
    },
}  # fmt: skip

NUMBERS = [
    ({"scaling": NAN}, ValueError, "scaling is nan; expected a finite number"),
    ({"scaling": "2"}, TypeError, "scaling is str; expected a number"),
]
DROPOUT = [
    ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5; expected a probability in [0, 1]"),
    ({"dropout_p": None}, TypeError, "dropout_p is NoneType; expected a number"),
    ({"seed": 0.5}, TypeError, "seed is 0.5; expected an integer"),
    ({"seed": 2**63}, ValueError, "seed is 9223372036854775808; expected a signed 64-bit integer"),
    ({"seed": torch.tensor([3], dtype=torch.int32)}, TypeError, "seed has dtype torch.int32; expected torch.int64"),
]
CASES = {
    "lora_linear": [
        ({"lora_bias": ones(16)}, ValueError, "lora_bias has shape (16,), but weight has 12 output features"),
        ({"lora_bias": ones(12).half()}, TypeError, "lora_bias has dtype torch.float16, but lora_B has torch.float32"),
        ({"lora_bias": ones(12, device="meta")}, ValueError, "lora_bias is on meta"),
        ({"lora_bias": True}, TypeError, "lora_bias is bool; expected a torch.Tensor"),
        ({"token_mask": ones(2, 3)}, TypeError, "token_mask has dtype torch.float32; expected torch.bool"),
        ({"token_mask": ones(6, dtype=torch.bool)}, ValueError,
         "token_mask has shape (6,), but x has shape (2, 3, 16); expected (2, 3)"),
        ({"token_mask": [True]}, TypeError, "token_mask is list; expected a torch.Tensor"),
        ({"lora_A": ones(4, 15)}, ValueError, "lora_A has shape (4, 15), but x has 16 features; expected (r, 16)"),
    ],
    "lora_linear_group": [
        ({"x": ones(())}, ValueError, "x has no dimensions; expected (..., in_features)"),
        ({"x": [1.0]}, TypeError, "x is list; expected a torch.Tensor"),
        ({"weights": []}, ValueError, "weights is empty; expected at least one"),
        ({"weights": [ones(12, 16), ones(8, 15)]}, ValueError, "weights[1] has shape (8, 15), but"),
        ({"weights": [ones(12, 16), ones(8, 16).half()]}, TypeError, "weights[1] has dtype torch.float16, but x has"),
        ({"weights": [ones(12, 16), ones(8, 16, device="meta")]}, ValueError, "weights[1] is on meta"),
        ({"weights": [ones(12, 16)]}, ValueError, "lora_As has 1/"),
        ({"lora_As": [ones(4, 16), ones(2, 16)]}, ValueError, "lora_As has 1/1 and lora_Bs 1/2 adapters; expected"),
        ({"lora_Bs": [ones(12, 4), None]}, ValueError, "lora_As has 1/"),
        ({"lora_As": [ones(4, 15), [ones(2, 16), ones(3, 16)]]}, ValueError, "A of adapter 0 (of weights[0]) has"),
        ({"lora_As": [ones(4, 16), [ones(2, 16), ones(3, 16).half()]]}, TypeError, "A of adapter 2 (of weights[1])"),
        ({"lora_As": [ones(0, 16), [ones(2, 16), ones(3, 16)]]}, ValueError, "r is 0; expected 1 <= r <= 512"),
        ({"lora_Bs": [ones(12, 4), [ones(8, 2), ones(8, 4)]]}, ValueError, "B of adapter 2 (of weights[1]) has"),
        ({"lora_Bs": [ones(12, 4).half(), [ones(8, 2), ones(8, 3)]]}, TypeError, "B of adapter 0 (of weights[0])"),
        ({"biases": [ones(12)]}, ValueError, "biases has 1 entries; expected one for each of the 2 weights"),
        ({"biases": [ones(11), None]}, ValueError, "biases[0] has shape (11,), but weights[0] has 12 output features"),
        ({"biases": [ones(12).half(), None]}, TypeError, "biases[0] has dtype torch.float16, but weights[0] has"),
        ({"scalings": [1.0]}, ValueError, "scalings has 1 entries; expected one for each of the 2 weights"),
        ({"scalings": [1.0, [1.0]]}, ValueError, "scalings[1] has 1 entries; expected one for each of 2 adapters"),
        ({"scalings": [1.0, [1.0, INF]]}, ValueError, "scalings is inf; expected a finite number"),
        ({"dropout_p": [0.5]}, ValueError, "dropout_p has 1 entries; expected one for each of the 2 weights"),
        ({"dropout_p": [0.5, [0.5, -0.5]]}, ValueError, "dropout_p is -0.5; expected a probability in [0, 1]"),
        ({"seed": torch.tensor([3])}, ValueError, "seed has shape (1,); expected (3,), one for each adapter"),
        *DROPOUT[2:],
        ({"token_mask": ones(2, 3)}, TypeError, "token_mask has dtype torch.float32; expected torch.bool"),
        ({"token_mask": ones(3, dtype=torch.bool)}, ValueError, "token_mask has shape (3,), but x has shape"),
    ],
    "dora_linear": [
        ({"x": ones(2, 15)}, ValueError, "weight has shape (12, 16), but x has 15 features"),
        ({"lora_B": ones(4, 12)}, ValueError, "lora_B has shape (4, 12), but weight has 12 output features and lora_A"),
        ({"magnitude": ones(16)}, ValueError, "magnitude has shape (16,), but weight has 12 output features"),
        ({"magnitude": ones(12, 1)}, ValueError, "magnitude has shape (12, 1), but"),
        ({"magnitude": ones(12).half()}, TypeError, "magnitude has dtype torch.float16, but lora_A has torch.float32"),
        ({"magnitude": None}, TypeError, "magnitude is NoneType; expected a torch.Tensor"),
        ({"magnitude": ones(12, device="meta")}, ValueError, "magnitude is on meta"),
        ({"weight_norm": ones(16)}, ValueError, "weight_norm has shape (16,), but weight has 12 output features"),
        ({"weight_norm": ones(12, dtype=I64)}, TypeError, "weight_norm has dtype torch.int64; expected float32"),
        *NUMBERS, *DROPOUT,
    ],
    "dora_weight_norm": [
        ({"weight": ones(16)}, ValueError, "weight has shape (16,), but it is a matrix; expected (out_"),
        ({"lora_A": ones(4, 15)}, ValueError, "lora_A has shape (4, 15), but weight has 16 input features"),
        ({"lora_B": ones(12, 3)}, ValueError, "lora_B has shape (12, 3), but"),
        ({"lora_B": ones(12, 4).half()}, TypeError, "lora_B has dtype torch.float16, but lora_A has torch.float32"),
        ({"lora_A": ones(4, 16, device="meta")}, ValueError, "lora_A is on meta"),
        ({"weight_norm_squared": ones(1)}, ValueError, "weight_norm_squared has shape (1,), but weight has 12"),
        ({"weight_norm_squared": 2.0}, TypeError, "weight_norm_squared is float; expected a torch.Tensor"),
        *NUMBERS,
    ],
    "gated_activation": [
        ({"up": ones(2, 7)}, ValueError, "up has shape (2, 7), but gate has another; expected (2, 8)"),
        ({"up": ones(2, 8).half()}, TypeError, "up has dtype torch.float16, but gate has torch.float32"),
        ({"gate": ones(2, 8, dtype=I64)}, TypeError, "gate has dtype torch.int64; expected float32"),
        ({"up": ones(2, 8, device="meta")}, ValueError, "up is on meta"),
        ({"activation": "relu"}, ValueError, "activation is 'relu'; expected one of silu, gelu, gelu_tanh"),
        ({"activation": None}, ValueError, "activation is None; expected one of silu"),
    ],
    "lora_swiglu_mlp": [
        ({"weights": [ones(12, 16), ones(16, 12)]}, ValueError, "weights has 2 entries; expected (gate, up, down)"),
        ({"weights": [ones(12, 16), ones(11, 16), ones(16, 12)], "biases": None}, ValueError, "weights[1] has shape"),
        ({"weights": [ones(12, 16), ones(12, 16), ones(16, 11)]}, ValueError, "weights[2] has shape (16, 11), but"),
        ({"lora_As": [ones(4, 16), None, ones(4, 16)]}, ValueError, "A of adapter 1 (of weights[2]) has shape (4, 16)"),
        ({"lora_Bs": [ones(12, 4), None, None]}, ValueError, "lora_As has 1/"),
        ({"activation": "tanh"}, ValueError, "activation is 'tanh'; expected one of silu"),
        ({"biases": [ones(12), None, ones(12)]}, ValueError, "biases[2] has shape (12,), but weights[2] has 16"),
        ({"x": ones(())}, ValueError, "x has no dimensions; expected (..., in_features)"),
        ({"scalings": NAN}, ValueError, "scalings is nan; expected a finite number"),
        *DROPOUT,
    ],
    "lora_embedding": [
        ({"input": ones(2, 3)}, TypeError, "input has dtype torch.float32; expected torch.int32 or torch.int64"),
        ({"input": [1]}, TypeError, "input is list; expected a torch.Tensor"),
        ({"weight": ones(16)}, ValueError, "weight has shape (16,), but it is a table; expected (num_embeddings"),
        ({"lora_A": ones(9, 4)}, ValueError, "lora_A has shape (9, 4), but weight has 9 rows; expected (r, 9)"),
        ({"lora_B": ones(4, 16)}, ValueError, "lora_B has shape (4, 16), but weight has 16 columns and lora_A rank 4"),
        ({"lora_B": ones(16, 4).half()}, TypeError, "lora_B has dtype torch.float16, but lora_A has torch.float32"),
        ({"weight": ones(9, 16, device="meta")}, ValueError, "weight is on meta"),
        ({"padding_idx": 9}, ValueError, "padding_idx is 9; expected an index of one of the 9 rows"),
        ({"padding_idx": -10}, ValueError, "padding_idx is -10; expected an index of one of the 9 rows"),
        *NUMBERS,
    ],
    "lora_expert_linear": [
        ({"x": ones(2, 3, 16)}, ValueError, "x has shape (2, 3, 16), but rows are sorted by expert"),
        ({"weight": ones(12, 16)}, ValueError, "weight has shape (12, 16), but x has 16 features; expected (experts"),
        ({"weight": ones(2, 12, 16).half(), "bias": None}, TypeError, "weight has dtype torch.float16, but x has"),
        ({"lora_A": ones(3, 4, 16)}, ValueError, "lora_A has shape (3, 4, 16), but weight has 2 experts and 16 input"),
        ({"lora_B": ones(2, 4, 12)}, ValueError, "lora_B has shape (2, 4, 12), but weight has 2 experts, 12 output"),
        ({"lora_B": ones(2, 12, 4).half()}, TypeError, "lora_B has dtype torch.float16, but lora_A has torch.float32"),
        ({"bias": ones(12)}, ValueError, "bias has shape (12,), but weight has 2 experts and 12 output features"),
        ({"bias": ones(2, 12).half()}, TypeError, "bias has dtype torch.float16, but weight has torch.float32"),
        ({"offsets": torch.tensor([2, 6])}, TypeError, "offsets has dtype torch.int64; expected torch.int32"),
        ({"offsets": ones(3, dtype=torch.int32)}, ValueError, "offsets has shape (3,), but weight has 2 experts"),
        ({"offsets": [2, 6]}, TypeError, "offsets is list; expected a torch.Tensor"),
        ({"offsets": ones(2, dtype=torch.int32, device="meta")}, ValueError, "offsets is on meta"),
        *NUMBERS, *DROPOUT,
    ],
    "multi_lora_linear": [
        ({"x": ones(())}, ValueError, "x has no dimensions; expected (..., in_features)"),
        ({"x": [1.0]}, TypeError, "x is list; expected a torch.Tensor"),
        ({"weight": ones(12, 15)}, ValueError, "weight has shape (12, 15), but x has 16 features"),
        ({"weight": ones(12, 16).half()}, TypeError, "weight has dtype torch.float16, but x has"),
        ({"weight": ones(12, 16, device="meta")}, ValueError, "weight is on meta"),
        ({"bias": ones(11)}, ValueError, "bias has shape (11,), but weight has 12 output features"),
        ({"lora_As": [ones(4, 16)]}, ValueError, "lora_As has 1 adapters and lora_Bs 3; expected 1 of each, None for"),
        ({"lora_As": [ones(4, 16), None, None]}, ValueError, "adapter 2 has a B but no A; expected both or neither"),
        ({"lora_Bs": [ones(12, 4), None, None]}, ValueError, "adapter 2 has a A but no B; expected both or neither"),
        ({"lora_As": [ones(4, 16), None, ones(2, 15)]}, ValueError, "lora_As[2] has shape (2, 15), but x has 16 feat"),
        ({"lora_As": [ones(4, 16), None, ones(2)]}, ValueError, "lora_As[2] has shape (2,), but x has 16 features"),
        ({"lora_As": [ones(4, 16), None, [2]]}, TypeError, "lora_As[2] is list; expected a torch.Tensor"),
        ({"lora_As": [ones(4, 16), None, ones(2, 16).half()]}, TypeError,
         "lora_As[2] has dtype torch.float16, but the first adapter has torch.float32"),
        ({"lora_As": [ones(4, 16), None, ones(2, 16, dtype=I64)]}, TypeError, "lora_As[2] has dtype torch.int64"),
        ({"lora_As": [ones(4, 16), None, ones(0, 16)]}, ValueError, "r is 0; expected 1 <= r <= 512"),
        ({"lora_As": [ones(513, 16), None, ones(2, 16)]}, ValueError, "r is 513; expected 1 <= r <= 512"),
        ({"lora_As": [ones(4, 16), None, ones(2, 16, device="meta")]}, ValueError, "lora_As[2] is on meta"),
        ({"lora_Bs": [ones(12, 4), None, ones(2, 12)]}, ValueError,
         "lora_Bs[2] has shape (2, 12), but weight has 12 output features and lora_As[2] rank 2; expected (12, 2)"),
        ({"lora_Bs": [ones(12, 4), None, ones(12, 2).half()]}, TypeError, "lora_Bs[2] has dtype torch.float16, but l"),
        ({"lora_Bs": [ones(12, 4), None, "B"]}, TypeError, "lora_Bs[2] is str; expected a torch.Tensor"),
        ({"lora_Bs": None}, ValueError, "lora_As has 3 adapters and lora_Bs 0; expected 3 of each"),
        ({"scalings": None}, TypeError, "scalings is None; expected a number for all adapters or one for each"),
        ({"scalings": [1.0, 2.0]}, ValueError, "scalings has 2 entries; expected one for each of the 3 adapters"),
        ({"scalings": [1.0, None, NAN]}, ValueError, "scalings is nan; expected a finite number"),
        ({"scalings": {}}, TypeError, "scalings is dict; expected a number"),
        ({"adapter_ids": [0, 1]}, TypeError, "adapter_ids is list; expected a torch.Tensor"),
        ({"adapter_ids": ones(2, 2)}, TypeError, "adapter_ids has dtype torch.float32; expected torch.int32 or torch."),
        ({"adapter_ids": ones(2, 2, dtype=I64, device="meta")}, ValueError, "adapter_ids is on meta"),
        ({"adapter_ids": torch.tensor([[0, 3], [0, 0]])}, ValueError, "adapter_ids holds 3; expected ids in [-1, 3), "),
        ({"adapter_ids": torch.tensor([[0, -2], [0, 0]])}, ValueError, "adapter_ids holds -2; expected ids in [-1, 3)"),
        ({"adapter_ids": torch.zeros(3, 2, dtype=I64), "adapter_weights": ones(3, 2)}, ValueError,
         "adapter_ids has shape (3, 2), but x has shape (2, 3, 16); expected (2, 3, k), one per row, or (2, k), one "),
        ({"adapter_ids": torch.zeros(6, dtype=I64), "adapter_weights": None}, ValueError,
         "adapter_ids has shape (6,), but x has shape (2, 3, 16); expected (2, 3), one per row, or (2), one per"),
        ({"adapter_weights": ones(2, 1)}, ValueError,
         "adapter_weights has shape (2, 1); expected that of adapter_ids, (2, 2)"),
        ({"adapter_weights": ones(2, 2, dtype=I64)}, TypeError, "adapter_weights has dtype torch.int64; expected flo"),
        ({"adapter_weights": ones(2, 2, device="meta")}, ValueError, "adapter_weights is on meta"),
        ({"adapter_weights": [1.0]}, TypeError, "adapter_weights is list; expected a torch.Tensor"),
        ({"dropout_p": [0.5]}, ValueError, "dropout_p has 1 entries; expected one for each of the 3 adapters"),
        ({"dropout_p": [0.5, 0.0, -0.5]}, ValueError, "dropout_p is -0.5; expected a probability in [0, 1]"),
        ({"seed": torch.tensor([3, 4])}, ValueError, "seed has shape (2,); expected (1,)"),
        *DROPOUT,
    ],
    "multi_lora_expert_linear": [
        ({"x": ones(2, 3, 16)}, ValueError, "x has shape (2, 3, 16), but rows are sorted by expert"),
        ({"weight": ones(12, 16)}, ValueError, "weight has shape (12, 16), but x has 16 features; expected (experts"),
        ({"weight": ones(2, 12, 16).half(), "bias": None}, TypeError, "weight has dtype torch.float16, but x has"),
        ({"bias": ones(12)}, ValueError, "bias has shape (12,), but weight has 2 experts and 12 output features"),
        ({"lora_As": [ones(4, 16), None, ones(2, 3, 16)]}, ValueError,
         "lora_As[0] has shape (4, 16), but weight has 2 experts and x has 16 features; expected (2, r, 16)"),
        ({"lora_As": [ones(3, 4, 16), None, ones(2, 3, 16)]}, ValueError, "lora_As[0] has shape (3, 4, 16), but wei"),
        ({"lora_As": [ones(2, 4, 16)]}, ValueError, "lora_As has 1 adapters and lora_Bs 3; expected 1 of each"),
        ({"lora_As": [ones(2, 4, 16), None, ones(2, 0, 16)]}, ValueError, "r is 0; expected 1 <= r <= 512"),
        ({"lora_Bs": [ones(2, 12, 4), None, ones(2, 3, 12)]}, ValueError,
         "lora_Bs[2] has shape (2, 3, 12), but weight has 2 experts and weight has 12 output features and"),
        ({"lora_Bs": [ones(2, 12, 4), ones(2, 12, 1), None]}, ValueError, "adapter 1 has a B but no A; expected both"),
        ({"lora_Bs": [ones(2, 12, 4), None, ones(2, 12, 3).half()]}, TypeError, "lora_Bs[2] has dtype torch.float16"),
        ({"offsets": torch.tensor([2, 6])}, TypeError, "offsets has dtype torch.int64; expected torch.int32"),
        ({"offsets": ones(3, dtype=torch.int32)}, ValueError, "offsets has shape (3,), but weight has 2 experts"),
        ({"offsets": ones(2, dtype=torch.int32, device="meta")}, ValueError, "offsets is on meta"),
        ({"adapter_ids": torch.tensor([0, 2, 3, 1, 0, 0])}, ValueError, "adapter_ids holds 3; expected ids in [-1, 3)"),
        ({"adapter_ids": torch.zeros(5, dtype=I64)}, ValueError, "adapter_ids has shape (5,), but x has shape (6, 16)"),
        ({"adapter_weights": ones(6, 1)}, ValueError, "adapter_weights has shape (6, 1); expected that of adapter_ids"),
        ({"scalings": None}, TypeError, "scalings is None; expected a number for all adapters or one for each"),
        ({"scalings": [1.0, None, NAN]}, ValueError, "scalings is nan; expected a finite number"),
        ({"lora_As": PoolLayer(None, "experts", 0), "lora_Bs": None}, TypeError,
         "lora_As is a layer of an AdapterPool, which holds no stacks; expected a list of tensors"),
        *DROPOUT,
    ],
    "multi_lora_linear_group": [
        ({"weights": []}, ValueError, "weights is empty; expected at least one"),
        ({"weights": [ones(12, 16), ones(8, 15)]}, ValueError, "weights[1] has shape (8, 15), but x has 16 features"),
        ({"lora_As": [[ones(4, 16), ones(2, 16)]]}, ValueError,
         "lora_As has 1 and lora_Bs 2 entries; expected one for each of the 2 weights"),
        ({"lora_As": [[ones(4, 16), ones(2, 16)], None]}, ValueError, "lora_As[1] has 0 adapters and lora_Bs 2"),
        ({"lora_As": [[ones(4, 16), ones(2, 16)], [None, ones(3, 15)]]}, ValueError, "lora_As[1][1] has shape (3, 15)"),
        ({"lora_Bs": [[ones(12, 4), ones(12, 2)], [None, ones(12, 3)]]}, ValueError, "lora_Bs[1][1] has shape (12, 3)"),
        ({"scalings": [1.0]}, ValueError, "scalings has 1 entries; expected one for each of the 2 weights"),
        ({"scalings": [1.0, [1.0]]}, ValueError, "scalings[1] has 1 entries; expected one for each of the 2 adapters"),
        ({"biases": [ones(12)]}, ValueError, "biases has 1 entries; expected one for each of the 2 weights"),
        ({"biases": [ones(11), None]}, ValueError, "biases[0] has shape (11,), but weights[0] has 12 output features"),
        ({"adapter_ids": torch.tensor([0, 2])}, ValueError, "adapter_ids holds 2; expected ids in [-1, 2), -1 for no"),
        ({"seed": torch.tensor([3])}, ValueError, "seed has shape (1,); expected (2,)"),
        ({"seed": 0.5}, TypeError, "seed is 0.5; expected an integer"),
    ],
}  # fmt: skip
ROWS = [pytest.param(op, *case, id=f"{op}-{case[2][:40]}") for op, cases in CASES.items() for case in cases]


@pytest.mark.parametrize("op", GOOD)
def test_the_good_arguments_are_good(op):
    getattr(functional, op)(**GOOD[op]())


@pytest.mark.parametrize(("op", "changes", "error", "message"), ROWS)
def test_refused(op, changes, error, message):
    refused(op, getattr(functional, op), {**GOOD[op](), **changes}, error, message)


@pytest.mark.parametrize(
    "op", ["lora_linear_group", "dora_linear", "lora_swiglu_mlp", "lora_expert_linear", "multi_lora_linear"]
)
def test_refused_under_autocast_too(op):
    with torch.autocast("cpu", torch.bfloat16):
        changes, error, message = next(case for case in CASES[op] if isinstance(case[0].get("x", 0), torch.Tensor))
        refused(op, getattr(functional, op), {**GOOD[op](), **changes}, error, message)


def test_an_index_outside_of_the_table():
    arguments = {**GOOD["lora_embedding"](), "input": torch.tensor([0, 9])}
    with pytest.raises(IndexError):
        functional.lora_embedding(**arguments)


@pytest.mark.parametrize("op", ["lora_expert_linear", "multi_lora_expert_linear"])
@pytest.mark.parametrize("ends", [[3, 2], [2, 7], [-1, 6]])
def test_offsets_that_are_no_rows(op, ends):
    """Found by whoever reads them on the host: never a read past the end."""
    arguments = {**GOOD[op](), "offsets": torch.tensor(ends, dtype=torch.int32)}
    with pytest.raises(ValueError, match=rf"^{op}: offsets\[\d\] is .*; expected one in"):
        getattr(functional, op)(**arguments)
