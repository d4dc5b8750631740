"""The ops over pruned weights: every density, both meanings of LoRA, what is outside the mask, memory and bad input."""

from __future__ import annotations

import math

import pytest
import torch

from peft_kernels import functional
from peft_kernels.formats import mask as masks
from peft_kernels.formats.mask import PackedMask
from peft_kernels.formats.positions import positions
from tests.allocations import peak_bytes
from tests.backends import across
from tests.helpers import assert_as_accurate_as_eager, assert_within_rounding, named
from tests.ops.cases import over
from tests.problems.masked import MaskedLoraProblem, MaskedProblem, MultiMaskProblem, drawn_mask

OPS = ("masked_linear", "masked_lora_linear", "multi_mask_linear")
MASKED = pytest.mark.parametrize("backend", across("masked_linear"), indirect=True)
LORA = pytest.mark.parametrize("backend", across("masked_lora_linear"), indirect=True)
MULTI = pytest.mark.parametrize("backend", across("multi_mask_linear"), indirect=True)
EVERY = pytest.mark.parametrize("backend", across(*OPS), indirect=True)
DENSITIES = (0.0, 0.001, 0.1, 0.5, 0.9, 1.0)


WAYS = ("", "clean", "compact", "nf4", "compact clean")


@over(
    "density,ways",
    ["masked_linear"],
    [(density, ways) for density in DENSITIES for ways in WAYS],
    composed=[(0.0, ""), (0.1, "clean"), (0.001, "compact"), (0.5, "nf4"), (0.9, "compact clean"), (1.0, "compact")],
    reference=[(0.0, ""), (0.5, "clean"), (0.1, "compact"), (0.9, "nf4"), (1.0, "compact clean")],
)
def test_every_density(backend, density, ways):
    options = dict.fromkeys(ways.split(), True)
    problem = MaskedProblem((3, 23), 141, 133, density=density, device=backend.device, **options)
    assert_as_accurate_as_eager(problem, problem.run())


@over(
    "density,update_masked,ways",
    ["masked_lora_linear"],
    [
        (density, masked, ways)
        for density in (0.0, 0.1, 1.0)
        for masked in (False, True)
        for ways in ("", "nf4", "clean")
    ],
    composed=[(0.0, True, ""), (0.1, False, "clean"), (0.1, True, "nf4"), (1.0, True, ""), (0.1, False, "")],
    reference=[(0.0, True, ""), (0.1, False, "nf4"), (0.1, True, "clean"), (1.0, False, "")],
)
def test_every_density_with_lora(backend, density, update_masked, ways):
    options = dict.fromkeys(ways.split(), True)
    problem = MaskedLoraProblem(
        (3, 43), 141, 133, 12, density=density, update_masked=update_masked, dropout_p=0.25 * (density == 0.1),
        device=backend.device, **options,
    )  # fmt: skip
    assert_as_accurate_as_eager(problem, problem.run())


@pytest.mark.parametrize("densities", [(0.0,), (0.001, 1.0), (0.9, 0.5, 0.5)], ids=str)
@MULTI
def test_every_density_of_many_masks(backend, densities):
    problem = MultiMaskProblem((4, 67), 141, 133, densities=densities, device=backend.device)
    assert_as_accurate_as_eager(problem, problem.run())


@pytest.mark.parametrize("compact", [False, True])
@MASKED
def test_a_float32_weight_under_autocast_gets_a_float32_gradient(backend, compact):
    """Each sum is rounded once, to the weight's dtype; W itself is rounded piece by piece."""
    problem = MaskedProblem(65, 96, 130, compact=compact, device=backend.device)
    with torch.autocast(backend.device, torch.bfloat16):
        y = problem.call()
    grad = problem.gradients(y, problem.tensors)["values" if compact else "weight"]
    assert (y.dtype, grad.dtype) == (torch.bfloat16, torch.float32)
    x = problem.tensors["x"].detach().bfloat16().double()
    whole = problem.grad_y.bfloat16().double().t() @ x
    truth = whole[problem.kept] if compact else whole * problem.kept
    assert (grad - truth).norm() <= 1e-6 * truth.norm()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@EVERY
def test_what_is_outside_the_mask_has_no_effect(backend, poison):
    """Neither NaN nor infinity: a choice, not a product."""
    kept = drawn_mask(70, 45, 0.4, device=backend.device)
    weight = torch.randn(70, 45, device=backend.device)
    x = torch.randn(6, 45, device=backend.device)
    factors = torch.randn(3, 45, device=backend.device), torch.randn(70, 3, device=backend.device)
    poisoned = torch.where(kept, weight, poison)

    def run(base):
        leaf, rows = base.clone().requires_grad_(), x.clone().requires_grad_()
        mask = masks.pack(kept)
        if backend.op == "masked_linear":
            y = functional.masked_linear(rows, leaf, mask)
        elif backend.op == "masked_lora_linear":
            y = functional.masked_lora_linear(rows, leaf.detach(), mask, *factors, update_masked=True)
        else:
            ids = torch.zeros(6, dtype=torch.int64, device=backend.device)
            y = functional.multi_mask_linear(rows, leaf, [mask], ids)
        wanted = [rows] if backend.op == "masked_lora_linear" else [rows, leaf]
        return y, *torch.autograd.grad(y.square().sum(), wanted)

    results, expected = run(poisoned), run(weight)
    assert expected[0].abs().sum() > 0
    assert all(torch.equal(result, truth) for result, truth in zip(results, expected, strict=True))
    for grad in results[2:]:
        assert not grad[~kept].any()
        assert grad[kept].any()


@MASKED
def test_the_compact_gradient_is_the_dense_one_at_the_kept_places(backend):
    dense = MaskedProblem(70, 75, 133, device=backend.device, density=0.3)
    compact = MaskedProblem(70, 75, 133, device=backend.device, density=0.3, compact=True)
    _, grads = dense.run()
    _, others = compact.run()
    # Two sums of 70 products of normal numbers, not everywhere in the same order.
    order = 4 * 70**0.5 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(others["values"], grads["weight"][dense.kept], rtol=1e-6, atol=order)
    assert "weight" not in others


@MASKED
def test_the_mask_may_change_between_steps(backend):
    problem = MaskedProblem(device=backend.device)
    before = problem.run()[0]
    problem.kept = ~problem.kept
    problem.mask = masks.pack(problem.kept)
    after = problem.run()
    assert_within_rounding(problem, after)
    assert not torch.equal(before, after[0])


@EVERY
def test_no_temporary_of_the_size_of_the_weight(backend):
    """Beyond outputs: pieces of at most 1 MiB and what goes with them; W has 16 MiB."""
    if backend.name == "reference" or backend.device != "cpu":
        pytest.skip("the reference makes W ⊙ M in full; allocations are counted on the CPU")
    kinds = {
        "masked_linear": lambda: MaskedProblem(16, 2048, 2048, bias=False),
        "masked_lora_linear": lambda: MaskedLoraProblem(16, 2048, 2048, 4, update_masked=True, bias=False),
        "multi_mask_linear": lambda: MultiMaskProblem(16, 2048, 2048, densities=(0.5,), bias=False),
    }
    problem = kinds[backend.op]()
    outputs = sum(value.nbytes for value in named(problem.run()).values())
    masks_copied = 2048 * 2048 // 8 if backend.op == "multi_mask_linear" else 0
    assert peak_bytes(problem.run) <= outputs + masks_copied + 16 * 2**20 // 4


def good() -> dict:
    return {"x": torch.ones(2, 3, 40), "weight": torch.ones(12, 40), "mask": masks.full(12, 40), "bias": torch.ones(12)}


WORDS = torch.zeros(12, 2, dtype=torch.int32)
BAD = [
    ({"mask": masks.full(40, 12)}, ValueError, "mask has shape (40, 12), but weight has shape (12, 40); expected"),
    ({"mask": torch.ones(12, 40, dtype=torch.bool)}, TypeError, "mask is Tensor; expected a peft_kernels.formats"),
    ({"mask": PackedMask(WORDS.long(), torch.Size((12, 40)))}, TypeError, "mask.words has dtype torch.int64"),
    ({"mask": PackedMask(WORDS[:, :1], torch.Size((12, 40)))}, ValueError, "mask.words has shape (12, 1), but mask"),
    ({"mask": masks.full(12, 40).to("meta")}, ValueError, "mask is on meta, but weight is on cpu"),
    ({"x": torch.ones(())}, ValueError, "x has no dimensions"),
    ({"x": torch.ones(2, 39)}, ValueError, "weight has shape (12, 40), but x has 39 features"),
    ({"weight": torch.ones(12, 40).half()}, TypeError, "weight has dtype torch.float16, but x has torch.float32"),
    ({"bias": torch.ones(40)}, ValueError, "bias has shape (40,), but weight has 12 output features"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
@pytest.mark.parametrize("op", ["masked_linear", "masked_lora_linear"])
def test_bad_input(op, change, error, message):
    arguments = good() | change
    if op == "masked_lora_linear":
        k = arguments["x"].shape[-1] if arguments["x"].ndim else 40
        arguments |= {"lora_A": torch.ones(2, k), "lora_B": torch.ones(12, 2)}
    with pytest.raises(error) as caught:
        getattr(functional, op)(**arguments)
    assert str(caught.value).startswith(f"{op}: {message}"), caught.value


def test_bad_grad_layouts():
    arguments, places = good(), masks.full(12, 40).positions()
    values = torch.ones(480)
    compact = {"grad_layout": "compact", "values": values, "places": places}
    wrong = [
        ({"grad_layout": "sparse"}, ValueError, "grad_layout is 'sparse'"),
        ({"values": values}, ValueError, "values and places are for grad_layout='compact'"),
        (compact | {"values": None}, TypeError, "values is NoneType"),
        (compact | {"places": None}, TypeError, "places is NoneType"),
        (compact | {"values": values[1:]}, ValueError, "values has shape (479,), but places has 480 places"),
        (compact | {"weight": torch.ones(12, 40, requires_grad=True)}, ValueError, "weight requires a gradient"),
        (compact | {"places": positions(torch.arange(480), (40, 12))}, ValueError, "places has shape (40, 12)"),
    ]
    for change, error, message in wrong:
        with pytest.raises(error) as caught:
            functional.masked_linear(**(arguments | change))
        assert message in str(caught.value)


def test_bad_masks_and_ids():
    x, weight, ids = torch.ones(5, 40), torch.ones(12, 40), torch.zeros(5, dtype=torch.int64)
    wrong = [
        ((masks.full(12, 40), ids), TypeError, "masks is PackedMask"),
        (([], ids), ValueError, "no masks"),
        (([masks.full(12, 39)], ids), ValueError, "masks[0] has shape (12, 39)"),
        ((masks.stack([masks.full(12, 39)]), ids), ValueError, "masks has shape (12, 39)"),
        (([masks.full(12, 40)], ids + 1), ValueError, "mask_ids holds 1; expected ids in [-1, 1)"),
        (([masks.full(12, 40)], ids[:4]), ValueError, "mask_ids has shape (4,)"),
        (([masks.full(12, 40)], ids.float()), TypeError, "mask_ids has dtype torch.float32"),
    ]
    for arguments, error, message in wrong:
        with pytest.raises(error) as caught:
            functional.multi_mask_linear(x, weight, *arguments)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("flat", "error", "message"),
    [
        (torch.tensor([0.0]), TypeError, "float32"),
        (torch.tensor([[0]]), ValueError, "shape (1, 1)"),
        (torch.tensor([-1, 3]), ValueError, "-1 to 3"),
        (torch.tensor([0, 480]), ValueError, "0 to 480"),
        (torch.tensor([3, 3]), ValueError, "each place once"),
        (torch.tensor([4, 3]), ValueError, "each place once"),
    ],
)
def test_bad_positions(flat, error, message):
    with pytest.raises(error) as caught:
        positions(flat, (12, 40))
    assert message in str(caught.value)


def test_a_second_derivative_is_refused():
    x, weight = torch.randn(4, 40, requires_grad=True), torch.randn(12, 40, requires_grad=True)
    y = functional.masked_linear(x, weight, masks.full(12, 40))
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="masked_linear: tried to differentiate twice"):
        grad.sum().backward()
