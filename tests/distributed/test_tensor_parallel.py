"""DTensor tensor parallelism over gloo: column- and row-parallel `FusedLoRALinear`s against one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor

from peft_kernels import FusedLoRALinear, functional
from tests.distributed.model import CLASSES, FEATURES, HIDDEN, full
from tests.helpers import relative_error

# Where each parameter is split, after PEFT's rule: a column-parallel base splits lora_B, a row-parallel one lora_A.
COLUMN = {"weight": Shard(0), "bias": Shard(0), "lora_A": Replicate(), "lora_B": Shard(0)}
ROW = {"weight": Shard(1), "bias": Replicate(), "lora_A": Shard(1), "lora_B": Replicate()}


class Pair(nn.Module):
    """The usual pair: column-parallel up, row-parallel down, with nothing gathered in between."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.up = FusedLoRALinear(FEATURES, HIDDEN, r=3, **options)
        self.down = FusedLoRALinear(HIDDEN, CLASSES, r=4, **options)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def build(**options) -> Pair:
    torch.manual_seed(0)
    pair = Pair(**options)
    for layer in (pair.up, pair.down):
        nn.init.normal_(layer.lora_B, std=0.2)
    return pair


def parallelise(layer: FusedLoRALinear, plan: dict, incoming, outgoing) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def split(name, module, mesh):
        for key, parameter in list(module.named_parameters(recurse=False)):
            sharded = nn.Parameter(distribute_tensor(parameter.data, mesh, [plan[key]]), parameter.requires_grad)
            module.register_parameter(key, sharded)

    def receive(module, inputs, mesh):
        (x,) = inputs
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [Replicate()])
        return x.redistribute(mesh, [incoming])

    def send(module, y, mesh):
        return y.redistribute(mesh, [outgoing])

    distribute_module(layer, mesh, split, receive, send)


def whole_batches(rank, options):
    pair = build(**options)
    parallelise(pair.up, COLUMN, Replicate(), Shard(-1))
    parallelise(pair.down, ROW, Shard(-1), Replicate())
    return train(pair)


def train(pair: Pair):
    generator = torch.Generator().manual_seed(3)
    data = [torch.randn(4, 5, FEATURES, generator=generator) for _ in range(3)]
    optimizer = torch.optim.AdamW([p for p in pair.parameters() if p.requires_grad], lr=1e-2)
    result = {}
    for step, x in enumerate(data):
        x = x.to(pair.up.weight.dtype).requires_grad_()
        y = pair(x)
        y = y.to_local() if isinstance(y, DTensor) else y
        y.square().mean().backward()
        if step == 0:
            result["y"], result["grad x"] = y.detach().clone(), full(x.grad)
            result.update({f"grad {name}": full(p.grad) for name, p in pair.named_parameters() if p.requires_grad})
        optimizer.step()
        optimizer.zero_grad()
    return {**result, **{name: full(p) for name, p in pair.named_parameters()}}


@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=str)
def test_column_and_row_parallel(workers, options):
    """Outputs, gradients (the bias counted once, replicated factors summed) and three steps of AdamW are equal."""
    truth = train(build(**options))
    for result in workers.run(whole_batches, options):
        assert set(result) == set(truth)
        for name, value in truth.items():
            torch.testing.assert_close(
                result[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_bfloat16_base(workers):
    """float32 adapters over a sharded bfloat16 base: right to bfloat16's rounding, gradients in their own dtype."""
    truth = train(build(dtype=torch.bfloat16))
    for result in workers.run(whole_batches, {"dtype": torch.bfloat16}):
        for name in [name for name in truth if name == "y" or name.startswith("grad")]:
            assert result[name].dtype == truth[name].dtype
            assert relative_error(result[name], truth[name]) < 0.02, name


def mean_under_dropout(rank, draws):
    pair = build(lora_dropout=0.5)
    parallelise(pair.up, COLUMN, Replicate(), Shard(-1))
    parallelise(pair.down, ROW, Shard(-1), Replicate())
    x = torch.ones(2, FEATURES)
    with torch.no_grad():
        once = pair.up(x).full_tensor()
        up = torch.stack([pair.up(x).full_tensor() for _ in range(draws)])
        middle = torch.ones(2, HIDDEN)
        down = torch.stack([pair.down(middle).full_tensor() for _ in range(draws)])
    return once, up, down


def test_dropout(workers):
    """Each draw differs; their mean is the layer without dropout, within five standard errors."""
    plain = build()
    expected = plain.up(torch.ones(2, FEATURES)), plain.down(torch.ones(2, HIDDEN))
    for once, *draws in workers.run(mean_under_dropout, 200):
        assert not torch.equal(once, draws[0][0])
        for values, truth in zip(draws, expected, strict=True):
            error = values.std(0) / 200**0.5
            assert bool(((values.mean(0) - truth).abs() < 5 * error + 1e-5).all())
            assert float(values.std(0).min()) > 0


def column_state(rank):
    pair = build()
    parallelise(pair.up, COLUMN, Replicate(), Shard(-1))
    return {name: (tuple(p.to_local().shape), p.full_tensor()) for name, p in pair.up.named_parameters()}


def test_gathered_parameters_have_full_shapes(workers):
    plain = build().up
    for state in workers.run(column_state):
        assert state["lora_B"][0] == (HIDDEN // 2, 3)
        assert state["lora_A"][0] == (3, FEATURES)
        for name, parameter in plain.named_parameters():
            assert torch.equal(state[name][1], parameter)


def seeded_dropout(rank):
    pair = build()
    parallelise(pair.up, COLUMN, Replicate(), Shard(-1))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = DTensor.from_local(torch.ones(2, FEATURES), mesh, [Replicate()])
    try:
        functional.lora_linear(x, pair.up.weight, pair.up.lora_A, pair.up.lora_B, dropout_p=0.5, seed=1)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_a_seed_is_refused(workers):
    """The masks of DTensors are torch's own: a seed would be ignored without a word."""
    for answer in workers.run(seeded_dropout):
        assert answer.startswith("lora_linear: seed is given")
