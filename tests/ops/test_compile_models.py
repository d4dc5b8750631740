"""torch.compile(fullgraph=True) over layers that differ and batches that change: how many graphs are made."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import peft_kernels
from peft_kernels import FusedLoRALinear, functional

K, N, R = 32, 24, 4


@pytest.fixture
def counter():
    torch._dynamo.reset()
    torch.set_default_dtype(torch.float64)  # so that another order of sums is not taken for another result
    yield torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch.set_default_dtype(torch.float32)
    torch._dynamo.reset()


def train(call, x, parameters):
    y = call(x)
    y = y if isinstance(y, torch.Tensor) else torch.cat([part.flatten() for part in y])
    return y.detach(), torch.autograd.grad(y.square().sum(), parameters)


def same(left, right) -> None:
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).requires_grad_()


def calls():
    """(name, function of x, tensors with gradients) for the ops that share x among projections or split a weight."""
    weights, down = [torch.randn(N, K), torch.randn(N, K)], torch.randn(K, N)
    As, Bs = [leaf(R, K), leaf(2, K), leaf(R, N)], [leaf(N, R), leaf(N, 2), leaf(K, R)]
    magnitude = leaf(N)
    yield "group", lambda x: functional.lora_linear_group(x, weights, As[:2], Bs[:2], scalings=1.5), As[:2] + Bs[:2]
    yield (
        "tied",
        lambda x: functional.lora_linear_group(x, [weights[0]] * 2, [As[0]] * 2, [Bs[0]] * 2, scalings=[1.5, 2.5]),
        [As[0], Bs[0]],
    )
    lists = [[As[0], As[1], As[0]], None, [None, As[1], As[0]]], [[Bs[0], Bs[1], Bs[0]], None, [None, Bs[1], Bs[0]]]
    yield (
        "multi",
        lambda x: functional.multi_lora_linear_group(
            x, [weights[0], *weights], *lists, torch.arange(len(x)) % 4 - 1, scalings=[1.5, None, [None, 0.5, 2.5]]
        ),
        As[:2] + Bs[:2],
    )
    yield "mlp", lambda x: functional.lora_swiglu_mlp(x, [*weights, down], As, Bs, scalings=1.5), As + Bs
    yield "dora", lambda x: functional.dora_linear(x, weights[0], As[0], Bs[0], magnitude, scaling=1.5), [
        As[0], Bs[0], magnitude,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["group", "tied", "multi", "mlp", "dora"])
def test_one_graph_for_every_batch_size(counter, name):
    torch.manual_seed(0)
    call, parameters = next((call, parameters) for other, call, parameters in calls() if other == name)
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for rows in (7, 16, 40, 129):
        x = torch.randn(rows, K)
        torch._dynamo.mark_dynamic(x, 0)
        same(train(compiled, x, parameters), train(call, x, parameters))
    assert counter.frame_count == 1


def test_layers_that_differ_in_alpha_share_a_graph(counter):
    """One graph with the first scaling as a constant, one with any scaling: not one for each."""
    torch.manual_seed(0)
    layers = [FusedLoRALinear(K, N, R, lora_alpha=alpha) for alpha in (4, 8, 16, 32, 2, 5)]
    compiled = torch.compile(lambda layer, x: layer(x), fullgraph=True, backend=counter)
    for layer in layers:
        nn.init.normal_(layer.lora_B)
        x, parameters = torch.randn(8, K), [layer.lora_A, layer.lora_B]
        same(train(lambda x, layer=layer: compiled(layer, x), x, parameters), train(layer, x, parameters))
    assert counter.frame_count == 2


def test_an_accelerated_model_is_one_graph_for_every_length(counter):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(LlamaModel(config), LoraConfig(r=R, target_modules=targets, init_lora_weights=False))
    peft_kernels.accelerate(model, strict=True)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def call(ids):
        return model(ids, use_cache=False).last_hidden_state

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for length in (7, 16, 23):
        ids = torch.randint(0, 64, (2, length))
        torch._dynamo.mark_dynamic(ids, 1)
        same(train(compiled, ids, parameters), train(call, ids, parameters))
    assert counter.frame_count == 1
