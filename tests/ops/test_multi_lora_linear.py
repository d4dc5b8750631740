"""`multi_lora_linear`: each row of a batch is the run of its own adapter, in numbers and in gradients.

What every op has to do is tested with all of them (`cases.py`); this is what only rows with adapters of their own do.
"""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F

from peft_kernels import AdapterPool, functional, use_backend
from peft_kernels.problems import Draw, nf4_weight
from tests.backends import everywhere
from tests.helpers import assert_as_accurate_as_eager, assert_within_rounding, named
from tests.problems import MultiLoraProblem

module = importlib.import_module("peft_kernels.functional.multi_lora_linear")  # in the package it is the function
EVERYWHERE = pytest.mark.parametrize("backend", everywhere("multi_lora_linear"), indirect=True)
F32, BF16 = torch.float32, torch.bfloat16
RANKS = (1, 8, 64, 96, None, 8)
THOUSAND = tuple(1 + a % 7 if a % 50 else None for a in range(1000))

SITUATIONS = {
    "mixed ranks, an adapter without rows": {"m": 60, "ranks": RANKS},
    "a batch of base rows": {"m": 9, "ids": [-1] * 9},
    "one adapter for all": {"m": 9, "ids": [3] * 9},
    "one adapter in all": {"m": 9, "ranks": (6,)},
    "one adapter without rows": {"m": 9, "ranks": (6,), "ids": [-1] * 9},
    "one row": {"m": 1, "ids": [3]},
    "a vector": {"m": (), "ids": 3},
    "no rows": {"m": 0, "ids": torch.empty(0, dtype=torch.int64)},
    "a thousand": {"m": 64, "k": 24, "n": 20, "ranks": THOUSAND},
    "a sample each": {"m": (6, 5), "ids": torch.tensor([1, 3, -1, 0, 1, 2]).repeat_interleave(5)},
    "a token each": {"m": (6, 5), "ranks": RANKS},
    "several a row": {"m": (6, 5), "ranks": RANKS, "per_row": 3},
    "one a row, weighted": {"m": 30, "mixed": True},
    "the same twice in a row": {"m": 4, "ids": [[1, 1], [0, 3], [-1, 0], [3, 3]]},
    "other dropout for each": {"m": 40, "ranks": (3, 5, 8), "dropout_p": (0.0, 0.5, 1.0)},
}


# Where a mask meets something else than rows and their adapters.
MASKED = (
    "mixed ranks, an adapter without rows",
    "a thousand",
    "a sample each",
    "several a row",
    "the same twice in a row",
)


def problem_of(situation: str, device: str, dropout_p: float = 0.0) -> MultiLoraProblem:
    return MultiLoraProblem(**{"dropout_p": dropout_p, **SITUATIONS[situation]}, device=device)


def alone(problem: MultiLoraProblem, adapter: int, training: bool = True):
    """What `lora_linear` with one adapter gives for all rows, and its gradients of A and B over those that chose it."""
    names = (f"lora_As.{adapter}", f"lora_Bs.{adapter}")
    t, mixes = problem.tensors, problem.tensors.get("adapter_weights")
    factors = [t[name].detach().requires_grad_() for name in names]
    x, grad_y = t["x"].detach().reshape(-1, problem.k), problem.grad_y.reshape(-1, problem.n)
    y = functional.lora_linear(
        x, t["weight"].detach(), *factors, scaling=problem.scalings[adapter], dropout_p=problem.probability(adapter),
        bias=t["bias"].detach(), seed=problem.seed, training=training,
    )  # fmt: skip
    own = problem.choices == adapter
    factor = own.to(x.dtype) if mixes is None else torch.where(own, mixes.detach().reshape(own.shape), 0.0)
    grads = torch.autograd.grad(y, factors, grad_y * factor.sum(1, keepdim=True))
    return y.detach(), dict(zip(names, grads, strict=True))


@pytest.mark.parametrize(
    ("situation", "dropout_p"), [*((name, 0.0) for name in SITUATIONS), *((name, 0.3) for name in MASKED)]
)
@EVERYWHERE
def test_each_row_is_its_adapter_alone(backend, situation, dropout_p):
    """PEFT's rule, forward and backward: training in one batch is training each adapter on its own rows."""
    problem = problem_of(situation, backend.device, dropout_p)
    result = problem.run()
    assert_within_rounding(problem, result)
    y, grads = result[0].reshape(-1, problem.n), result[1]
    base = F.linear(problem.tensors["x"], problem.tensors["weight"], problem.tensors["bias"]).detach().reshape(y.shape)
    expected, chosen = base.clone(), set(problem.choices.flatten().tolist())
    mixes = problem.tensors.get("adapter_weights")
    for adapter, r in enumerate(problem.ranks):
        if r is None:
            continue
        if adapter not in chosen:
            assert not any(grads[f"lora_{side}s.{adapter}"].any() for side in "AB"), adapter
            continue
        y_alone, own_grads = alone(problem, adapter)
        own = (problem.choices == adapter).to(y.dtype)
        factor = own if mixes is None else own * mixes.detach().reshape(own.shape)
        expected += factor.sum(1, keepdim=True) * (y_alone - base)
        for name, grad in own_grads.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-4, msg=name)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("situation", ["mixed ranks, an adapter without rows", "several a row", "a sample each"])
@EVERYWHERE
def test_eval_drops_nothing(backend, situation):
    problem = problem_of(situation, backend.device, 0.5)
    y = problem.call(training=False)
    problem.dropout_p = 0.0
    assert torch.equal(y, problem.call())


@pytest.mark.parametrize("per_row", [1, 2])
@EVERYWHERE
def test_gradients_of_each_adapter_are_as_accurate_as_training_it_alone(backend, per_row):
    """The composition that decides takes each adapter's rows out and runs them by themselves. At ranks and numbers of
    rows where the ratio of two errors is no luck; in 16 bits, so that rounding and not the order of sums decides."""
    problem = MultiLoraProblem(
        240, 132, 301, (12, 24, None, 64, 96), dtype=BF16, adapter_dtype=F32, per_row=per_row, device=backend.device
    )
    assert_as_accurate_as_eager(problem, problem.run())


@pytest.mark.parametrize("wanted", ["x", "adapter_weights", "lora_As", "lora_Bs", "weight", "bias"])
@EVERYWHERE
def test_each_gradient_alone_where_rows_weigh_several(backend, wanted):
    """What is kept of the forward pass is what this gradient needs."""
    problem = MultiLoraProblem(30, ranks=(3, None, 8), per_row=2, dropout_p=0.2, device=backend.device)
    problem.freeze_all_but(wanted)
    result = problem.run()
    assert {name.partition(".")[0] for name in result[1]} == {wanted}
    assert_within_rounding(problem, result)


@EVERYWHERE
def test_one_id_for_each_sample_or_each_row(backend):
    """The same numbers, int32 or int64; several of either."""
    per_sample = torch.tensor([2, -1, 0, 1], device=backend.device)
    problem = MultiLoraProblem((4, 3, 2), ranks=(3, 5, 8), ids=per_sample.repeat_interleave(6), device=backend.device)
    expected = problem.call()
    for ids in (per_sample, per_sample.int(), problem.ids.int()):
        (x, weight, lora_As, lora_Bs, _), options = problem.arguments(problem.tensors)
        assert torch.equal(functional.multi_lora_linear(x, weight, lora_As, lora_Bs, ids, **options), expected)
        weights = torch.full((*ids.shape, 2), 0.5, device=backend.device, requires_grad=True)
        twice = ids.unsqueeze(-1).expand(*ids.shape, 2)
        options["adapter_weights"] = weights
        y = functional.multi_lora_linear(x, weight, lora_As, lora_Bs, twice, **options)
        torch.testing.assert_close(y, expected)
        (grad,) = torch.autograd.grad(y.sum(), weights)
        assert grad.shape == weights.shape
        assert not grad[ids == -1].any()
        assert grad[ids != -1].all()


GROUP_NS, GROUP_RANKS = (40, 7, 65), ((5, None, 8), None, (None, 3, 16))


def group(device: str, m=(7, 5), k: int = 48):
    """Three layers over one x: adapters of other ranks, some without a part in a layer, a layer without any."""
    draw = Draw(device)
    x, weights = draw(F32, *m, k), [draw(F32, n, k, scale=k**-0.5) for n in GROUP_NS]
    lora_As, lora_Bs = [], []
    for n, ranks in zip(GROUP_NS, GROUP_RANKS, strict=True):
        present = [] if ranks is None else ranks
        lora_As.append([None if r is None else draw(F32, r, k, scale=k**-0.5).requires_grad_() for r in present])
        lora_Bs.append([None if r is None else draw(F32, n, r, scale=r**-0.5).requires_grad_() for r in present])
    none = [layer or None for layer in lora_As], [layer or None for layer in lora_Bs]
    scalings, biases = (1.5, None, (2.0, -0.5, 0.25)), [draw(F32, 40), None, draw(F32, 65).requires_grad_()]
    ids = draw.integers(4, *m) - 1
    return x.requires_grad_(), weights, *none, ids, scalings, biases


def factors_of(layer) -> list:
    return [factor for factor in layer or [] if factor is not None]


@pytest.mark.parametrize("unused", [None, 0, 2])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@EVERYWHERE
def test_a_group_is_its_layers(backend, dropout_p, unused):
    """Layer j with the seed s + j; what nobody used gets no gradients, not zeros."""
    x, weights, lora_As, lora_Bs, ids, scalings, biases = group(backend.device)
    seed = 70 if dropout_p else None
    ys = functional.multi_lora_linear_group(
        x, weights, lora_As, lora_Bs, ids, scalings=scalings, biases=biases, dropout_p=dropout_p, seed=seed
    )
    expected = []
    for j, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if lora_As[j] is None:
            expected.append(F.linear(x, weight, bias))
            continue
        expected.append(functional.multi_lora_linear(
            x, weight, lora_As[j], lora_Bs[j], ids, scalings=scalings[j], bias=bias, dropout_p=dropout_p,
            seed=seed + j if seed else None,
        ))  # fmt: skip
    torch.testing.assert_close(list(ys), expected, rtol=1e-5, atol=1e-5)
    leaves = [x, biases[2], *(t for side in (lora_As, lora_Bs) for layer in side for t in factors_of(layer))]
    first, second = (
        torch.autograd.grad(
            sum((y.square() * (j + 1)).sum() for j, y in enumerate(outputs) if j != unused), leaves, allow_unused=True
        )
        for outputs in (ys, expected)
    )
    for mine, theirs in zip(first, second, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


@EVERYWHERE
def test_over_four_bits(backend):
    """The base decoded gives the same, a group of a dense weight and one of 4 bits too."""
    draw = Draw(backend.device)
    qs = [nf4_weight(draw, n, 64) for n in (40, 33)]
    dense = [functional.nf4_dequantize(q, dtype=F32) for q in qs]
    problem = MultiLoraProblem((6, 5), 64, 40, RANKS, dropout_p=0.3, device=backend.device)
    problem.freeze_all_but("x", "lora_As", "lora_Bs", "bias")
    (x, _, lora_As, lora_Bs, ids), options = problem.arguments(problem.tensors)
    ys = [functional.multi_lora_linear(x, w, lora_As, lora_Bs, ids, **options) for w in (qs[0], dense[0])]
    results = [(y.detach(), problem.gradients(y, problem.tensors)) for y in ys]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)
    wider = [None if b is None else draw(F32, 33, b.shape[1]) for b in lora_Bs]

    def call(weights):
        factors = [lora_As, lora_As], [lora_Bs, wider]
        return functional.multi_lora_linear_group(x, weights, *factors, ids, scalings=0.5, dropout_p=0.2, seed=4)

    for weights in ([qs[0], dense[1]], [dense[0], qs[1]], qs):
        torch.testing.assert_close(call(weights), call(dense), rtol=1e-5, atol=1e-5)


@EVERYWHERE
def test_as_pefts_mixed_batch(backend):
    """PEFT's own loop over `adapter_names`, in eval mode, which is all it has."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(48, 40))
    ranks = {"one": 1, "eight": 8, "sixty-four": 64, "ninety-six": 96}
    model = None
    for name, r in ranks.items():
        config = peft.LoraConfig(r=r, lora_alpha=13, target_modules=["0"], init_lora_weights=False, lora_dropout=0.5)
        model = peft.LoraModel(base, config, name) if model is None else model
        if name not in model.peft_config:
            model.peft_config[name] = config
            model.inject_adapter(model.model, name)
    layer = model.eval().to(backend.device).model[0]
    names = ["sixty-four", "__base__", "one", "eight", "one", "sixty-four"]
    order = list(ranks)
    for shape in ((6, 48), (6, 7, 48)):
        x = torch.randn(shape, device=backend.device)
        expected = layer(x, adapter_names=names)
        y = functional.multi_lora_linear(
            x, layer.base_layer.weight, [layer.lora_A[name].weight for name in order],
            [layer.lora_B[name].weight for name in order],
            torch.tensor([-1 if name == "__base__" else order.index(name) for name in names], device=x.device),
            scalings=[layer.scaling[name] for name in order], bias=layer.base_layer.bias,
        )  # fmt: skip
        torch.testing.assert_close(y, expected)


@EVERYWHERE
def test_same_bits_every_time(backend):
    """Of a group, with several adapters a row, where sums over rows have most ways to differ."""
    problem = MultiLoraProblem((9, 14), 48, 40, RANKS, per_row=3, dtype=BF16, adapter_dtype=F32, dropout_p=0.2,
                               device=backend.device)  # fmt: skip
    first = named(problem.run())
    assert all(torch.equal(value, first[name]) for _ in range(3) for name, value in named(problem.run()).items())


@EVERYWHERE
def test_shared_parameters_get_the_sum(backend):
    """One A in the place of two adapters."""
    problem = MultiLoraProblem(30, ranks=(4, 4), ids=[a % 3 - 1 for a in range(30)], device=backend.device)
    apart = problem.run(**{"lora_As.1": problem.tensors["lora_As.0"].detach().requires_grad_()})[1]
    together = copy.copy(problem)
    together.tensors = {**problem.tensors, "lora_As.1": problem.tensors["lora_As.0"]}
    grads = together.run()[1]
    torch.testing.assert_close(grads["lora_As.0"], apart["lora_As.0"] + apart["lora_As.1"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bad", [5, -2, 2**40])
@EVERYWHERE
def test_ids_out_of_range_are_refused_before_anything_runs(backend, bad, monkeypatch):
    monkeypatch.setenv(module.CHECK_IDS_VARIABLE, "1")
    problem = MultiLoraProblem(6, device=backend.device)
    problem.ids[4] = bad
    with pytest.raises(ValueError, match=rf"adapter_ids holds {bad}; expected ids in \[-1, 5\), -1 for none"):
        problem.call()


def test_the_debug_switch_is_what_checks_ids_on_a_gpu(monkeypatch):
    """Reading them waits for the GPU, so they are read where the environment asks for it and on a CPU always."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.delenv(module.CHECK_IDS_VARIABLE, raising=False)
    assert (module.reads_ids(cpu), module.reads_ids(gpu)) == (True, False)
    monkeypatch.setenv(module.CHECK_IDS_VARIABLE, "1")
    assert (module.reads_ids(cpu), module.reads_ids(gpu)) == (True, True)
    monkeypatch.setenv(module.CHECK_IDS_VARIABLE, "0")
    assert not module.reads_ids(gpu)


@EVERYWHERE
def test_ids_out_of_range_that_nobody_checks_are_no_adapter(backend, monkeypatch):
    """As of a GPU without the switch: never a read past the table."""
    monkeypatch.setattr(module, "reads_ids", lambda device: False)
    problem = MultiLoraProblem(6, ids=[0, 1, -1, -1, 3, -1], device=backend.device)
    expected = named(problem.run())
    problem.ids = torch.tensor([0, 1, 5, -7, 3, 2**40], device=backend.device)
    for name, value in named(problem.run()).items():
        assert torch.equal(value, expected[name]), name


@EVERYWHERE
def test_ids_beyond_a_pools_slots_that_nobody_checks_are_no_adapter(backend, monkeypatch):
    monkeypatch.setattr(module, "reads_ids", lambda device: False)
    pool = AdapterPool({"q_proj": (6, 8)}, budget=1 << 16, slots=3, device=backend.device)
    x, weight, a, b = (torch.randn(*shape, device=backend.device) for shape in ((4, 8), (6, 8), (2, 8), (6, 2)))
    pool.load("anna", {"q_proj": (a, b)}, scaling=2.0)
    (slot,) = pool.ids(["anna"]).tolist()
    ids = torch.tensor([slot, 3, -9, 2**40], device=backend.device)
    y = functional.multi_lora_linear(x, weight, pool.layer("q_proj"), None, ids)
    expected = x @ weight.t()
    expected[0] += 2.0 * (x[0] @ a.t()) @ b.t()
    torch.testing.assert_close(y, expected)


def test_a_pool_beside_tensors_is_refused():
    pool = module.PoolLayer(None, "q_proj", 0)
    x, weight, a, b, ids = (torch.ones(*s) for s in ((2, 8), (6, 8), (2, 8), (6, 2), (2,)))
    for lora_Bs, scalings, name in (([b], None, "lora_Bs"), (None, 1.0, "scalings")):
        with pytest.raises(TypeError, match=f"{name} is given beside an AdapterPool, which has its own; expected None"):
            functional.multi_lora_linear(x, weight, pool, lora_Bs, ids.long() * 0, scalings=scalings)
    with pytest.raises(TypeError, match="lora_As mixes an AdapterPool with something else; expected layers of one"):
        functional.multi_lora_linear_group(x, [weight, weight], [pool, [a]], None, ids.long() * 0)


def test_sharded_tensors_are_refused():
    """A table of addresses of shards would be read as if each were whole."""
    from torch import distributed
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    problem = MultiLoraProblem(6, ranks=(3,), mixed=True)
    (x, weight, (a,), (b,), ids), options = problem.arguments(problem.tensors)
    plain = {"x": x, "weight": weight, "lora_As": [a], "lora_Bs": [b], "adapter_ids": ids, **options}
    functional.multi_lora_linear(**plain)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for name in ("x", "weight", "lora_As", "lora_Bs", "adapter_ids", "adapter_weights"):
            tensor = plain[name][0] if name.startswith("lora") else plain[name]
            sharded = distribute_tensor(tensor.detach(), mesh, [Replicate()])
            with pytest.raises(NotImplementedError, match="DTensors are not supported; expected tensors of one"):
                functional.multi_lora_linear(**{**plain, name: [sharded] if name.startswith("lora") else sharded})
    finally:
        distributed.destroy_process_group()


def test_adapters_that_follow_good_ones_are_checked():
    """Operands found valid are remembered: other adapters, one more, another dtype, another device must not pass."""
    problem = MultiLoraProblem(6, ranks=(3, 3))
    (x, weight, lora_As, lora_Bs, ids), options = problem.arguments(problem.tensors)
    functional.multi_lora_linear(x, weight, lora_As, lora_Bs, ids, **options)
    for change in (torch.ones(3, 47), torch.ones(3, 48).half(), torch.ones(3, 48, device="meta"), torch.ones(4, 48)):
        with pytest.raises((ValueError, TypeError), match=r"lora_[AB]s\[1\]"):
            functional.multi_lora_linear(x, weight, [lora_As[0], change], lora_Bs, ids, **options)
    with use_backend("reference"), pytest.raises(ValueError, match="weight has shape"):
        functional.multi_lora_linear(x[:, :-1], weight, lora_As, lora_Bs, ids, **options)
