"""Faults of others in autograd, dtype and random numbers: F26 to F40."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from peft_kernels import FusedLoRALinear
from tests.faults.problems import EVERYWHERE, assert_close, gradients, layer, lora, operands, plain
from tests.helpers import relative_error


@EVERYWHERE
def test_f26_dropout_masks_the_input_gradient(backend):
    """Forward masked but dX not, dropout never applied, or skipped by the fast path: read off dX itself."""
    x, weight, a, b = operands(16, 40, 24, 4, backend.device)
    ones = torch.ones(16, 40, device=backend.device)
    mask = torch.ops.peft_kernels.philox_dropout(ones, 0.4, torch.tensor([8], device=backend.device))
    assert 0.3 < float((mask == 0).float().mean()) < 0.5

    def masked(x, weight, a, b):
        return F.linear(x, weight) + ((x * mask) @ a.t()) @ b.t()

    def call(*tensors):
        return lora(*tensors, dropout_p=0.4, seed=8)

    tensors = (x, weight, a, b)
    assert_close([call(*tensors), *gradients(call, tensors)], [masked(*tensors), *gradients(masked, tensors)])
    assert not torch.allclose(call(*tensors), plain(*tensors))


@pytest.mark.parametrize("reentrant", [False, True])
def test_f27_recomputation_draws_the_same_mask(reentrant):
    """A mask that differs between forward and recomputation trains towards a wrong loss without any error."""
    module = layer(lora_dropout=0.5)
    x = torch.randn(32, 24, requires_grad=True)
    wanted = [x, module.lora_A, module.lora_B]

    def grads(run):
        for tensor in wanted:
            tensor.grad = None
        torch.manual_seed(6)
        y = run()
        torch.randn(100)  # other layers draw in between
        y.square().sum().backward()
        return [tensor.grad.clone() for tensor in wanted]

    plain_grads = grads(lambda: module(x))
    recomputed = grads(lambda: checkpoint(module, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain_grads, recomputed, strict=True))


def test_f27_an_explicit_seed_survives_preserve_rng_state_false():
    """Without PyTorch's bookkeeping of random states an explicit seed still gives the forward pass's mask."""
    tensors = operands(32, 24, 16, 4)

    def call(*t):
        return lora(*t, dropout_p=0.5, seed=99)

    recomputed = gradients(lambda *t: checkpoint(call, *t, use_reentrant=False, preserve_rng_state=False), tensors)
    assert all(torch.equal(a, b) for a, b in zip(gradients(call, tensors), recomputed, strict=True))


def test_f27_ranks_and_calls_draw_different_masks():
    """The mask is a function of torch's generator and nothing else: not of the process, time or address."""
    module = layer(lora_dropout=0.5)
    x = torch.randn(32, 24)
    torch.manual_seed(1)
    first, second = module(x), module(x)
    torch.manual_seed(2)
    other_rank = module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), first)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other_rank)


@EVERYWHERE
def test_f28_everything_dropped_equals_the_base_layer(backend):
    """Reported as a bug by users: in training mode with everything dropped the layer is the frozen one. No NaN."""
    module = layer(lora_dropout=1.0).to(backend.device)
    x = torch.randn(5, 24, device=backend.device)
    torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias))
    assert not torch.allclose(module.eval()(x), F.linear(x, module.weight, module.bias))


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_f29_autocast_as_peft(x_dtype, adapter_dtype):
    """A float32 residual stream that meets a 16-bit base under autocast: dtype and value as PEFT's own layer."""
    peft = pytest.importorskip("peft.tuners.lora.layer")
    config = pytest.importorskip("peft").LoraConfig(r=4, lora_alpha=8)
    module = layer(64, 48, r=4, lora_alpha=8, dtype=torch.bfloat16, adapter_dtype=adapter_dtype)
    base = torch.nn.Linear(64, 48).to(torch.bfloat16)
    base.load_state_dict({"weight": module.weight, "bias": module.bias})
    theirs = peft.Linear(base, "default", config, r=4, lora_alpha=8)
    theirs.lora_A["default"].weight.data = module.lora_A.data.clone()
    theirs.lora_B["default"].weight.data = module.lora_B.data.clone()
    x = torch.randn(40, 64).to(x_dtype)
    weight, bias, a, b = (p.detach().double() for p in (module.weight, module.bias, module.lora_A, module.lora_B))
    truth = F.linear(x.double(), weight, bias) + 2.0 * (x.double() @ a.t()) @ b.t()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, expected = module(x), theirs(x)
    assert ours.dtype == expected.dtype
    assert relative_error(ours, truth) <= 1.2 * relative_error(expected, truth)


def test_f30_no_copy_of_x_for_float32_adapters():
    """PEFT casts all of x to float32 for float32 adapters, a fifth of its peak. Here A and B are cast, x never."""
    module = layer(64, 48, r=4, dtype=torch.bfloat16)
    assert module.lora_A.dtype == torch.float32
    x = torch.randn(256, 64).bfloat16()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        y = module(x)
    copied = [e.input_shapes[0] for e in profile.events() if e.name in ("aten::copy_", "aten::_to_copy", "aten::clone")]
    assert [256, 64] not in copied
    assert y.dtype == torch.bfloat16


def test_f30_python_numbers_promote_nothing():
    """A scaling handed over as double must not turn float32 or bfloat16 into float64, whatever the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            tensors = operands(5, 24, 16, 4, dtype=dtype)
            assert lora(*tensors, scaling=0.1).dtype == dtype
            grads = gradients(lambda *t: lora(*t, scaling=0.1, dropout_p=0.5), tensors)
            assert {grad.dtype for grad in grads} == {dtype}
    finally:
        torch.set_default_dtype(before)


def test_f31_float16_model_trains_with_grad_scaler():
    """`Attempting to unscale FP16 gradients` never comes: adapters over a float16 base are float32 by default."""
    module = layer(dtype=torch.float16)
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    optimizer = torch.optim.AdamW([module.lora_A, module.lora_B], lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    before = module.lora_B.detach().clone()
    scaler.scale(module(torch.randn(9, 24).half()).float().square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 65536.0
    assert float((module.lora_B.detach() - before).abs().max()) > 0.05


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@EVERYWHERE
def test_f33_gradients_accumulate_in_float32(backend, adapter_dtype):
    """Sums over 5,000 rows: a bfloat16 accumulator of ones stops at 256, so anything near the truth was wider."""
    m, k, n = 5000, 16, 8
    x = torch.ones(m, k, device=backend.device, dtype=torch.bfloat16)
    weight = torch.zeros(n, k, device=backend.device, dtype=torch.bfloat16)
    a = torch.full((2, k), 1 / k, device=backend.device, dtype=adapter_dtype)
    b = torch.full((n, 2), 1.0, device=backend.device, dtype=adapter_dtype)
    _, grad_w, grad_a, grad_b = gradients(lora, (x, weight, a, b))
    step = 2.0**-8  # half a unit of bfloat16's last place, relative
    for grad, truth in ((grad_w, m), (grad_a, m * n), (grad_b, m)):
        assert float((grad.double() / truth - 1).abs().max()) <= step


@pytest.mark.parametrize("wanted", ["a", "b", "x", "ab", "", "wab"])
@EVERYWHERE
def test_f34_only_what_is_asked_for(backend, wanted):
    """LoRA-FA (A frozen), frozen B, x without gradient, nothing at all: no unbound name, no gradient too many."""
    tensors = dict(zip("xwab", operands(7, 24, 16, 4, backend.device), strict=True))
    expected = dict(zip("xwab", gradients(plain, tensors.values()), strict=True))
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in wanted)
    y = lora(*tensors.values())
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.sum().backward()
    for name, tensor in tensors.items():
        if name in wanted:
            assert_close([tensor.grad], [expected[name]])
        else:
            assert tensor.grad is None
    with torch.no_grad():
        torch.testing.assert_close(lora(*tensors.values()), y.detach())


def test_f35_gradient_penalty():
    """WGAN-style: the norm of dy/dx enters the loss. Saving S makes its gradient silently wrong, so it is refused,
    also where only a constant reaches the first backward pass."""
    module = layer()
    x = torch.randn(6, 24, requires_grad=True)
    score = module(x)
    (grad_x,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    loss = score.square().mean() + 10 * (grad_x.norm(dim=1) - 1).square().mean()
    with pytest.raises(RuntimeError, match="differentiate twice"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_f36_checkpoint_of_a_frozen_input(reentrant):
    """Adapters get gradients although the checkpointed block's input needs none (reentrant: after PEFT's remedy)."""
    module = layer(lora_dropout=0.3)
    x = torch.randn(9, 24)
    torch.manual_seed(0)
    expected = torch.autograd.grad(module(x).square().sum(), [module.lora_A, module.lora_B])
    if reentrant:
        x.requires_grad_()  # what enable_input_require_grads does
    torch.manual_seed(0)
    checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip((module.lora_A, module.lora_B), expected, strict=True))


def test_f36_scaling_changed_between_forward_and_backward():
    """An adapter re-scaled or switched in between: backward belongs to the forward pass that was run."""
    module = layer()
    x = torch.randn(9, 24)
    expected = torch.autograd.grad(module(x).square().sum(), [module.lora_A, module.lora_B])
    y = module(x)
    module.scaling *= 3
    grads = torch.autograd.grad(y.square().sum(), [module.lora_A, module.lora_B])
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_f37_nothing_outlives_its_step():
    """Over 50 steps, with and without backward, with an early-stopped recomputation: every activation is freed."""
    module = layer(lora_dropout=0.2)
    alive = []
    gc.collect()

    def tensors_alive():
        gc.collect()
        return sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor)

    counts = []
    for step in range(50):
        x = torch.randn(9, 24, requires_grad=True)
        alive.append(weakref.ref(x))
        y = checkpoint(module, x, use_reentrant=False) if step % 3 else module(x)
        if step % 2:
            y.sum().backward()
            module.zero_grad()
        del x, y
        if step in (10, 49):
            counts.append(tensors_alive())
    gc.collect()
    assert not [ref for ref in alive if ref() is not None]
    assert counts[0] == counts[1]


@EVERYWHERE
def test_f38_padding_rows(backend):
    """Infinity and NaN in the padding of a batch stay in their rows; a NaN in the data is not swallowed."""
    x, weight, a, b = operands(12, 24, 16, 4, backend.device)
    clean = lora(x, weight, a, b, dropout_p=0.5, seed=1)
    spoiled = x.clone()
    spoiled[9:] = torch.tensor([float("inf"), float("nan"), -float("inf")], device=backend.device)[:, None]
    leaf = spoiled.clone().requires_grad_()
    y = lora(leaf, weight, a, b, dropout_p=0.5, seed=1)
    torch.testing.assert_close(y[:9], clean[:9], rtol=1e-6, atol=1e-6)
    assert not y[9:].isfinite().any()
    (grad,) = torch.autograd.grad(y[:9].sum(), leaf)
    assert grad.isfinite().all()
    assert not grad[9:].any()


def test_f39_accumulated_gradients_equal_the_whole_batch():
    """Four micro-batches of different lengths, normalised by all tokens: the gradient of the batch in one go."""
    module = layer()
    x, target = torch.randn(20, 24), torch.randn(20, 16)
    expected = torch.autograd.grad((module(x) - target).square().sum() / 20, [module.lora_A, module.lora_B])
    for rows in (slice(0, 3), slice(3, 10), slice(10, 11), slice(11, 20)):
        ((module(x[rows]) - target[rows]).square().sum() / 20).backward()
    assert_close([module.lora_A.grad, module.lora_B.grad], expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@EVERYWHERE
def test_f40_deterministic_mode(backend, dropout_p):
    """torch.use_deterministic_algorithms(True) finds nothing to complain about, and ten runs agree to the bit."""
    tensors = operands(300, 40, 24, 8, backend.device)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [
            gradients(lambda *t: lora(*t, dropout_p=dropout_p, seed=4 if dropout_p else None), tensors)
            for _ in range(10)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_f40_training_twice_gives_the_same_bits():
    def train():
        torch.manual_seed(7)
        module = FusedLoRALinear(24, 16, r=4, lora_dropout=0.3)
        optimizer = torch.optim.AdamW([module.lora_A, module.lora_B], lr=1e-2)
        for _ in range(20):
            module(torch.randn(9, 24)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return module.lora_A.detach(), module.lora_B.detach()

    assert all(torch.equal(a, b) for a, b in zip(train(), train(), strict=True))
