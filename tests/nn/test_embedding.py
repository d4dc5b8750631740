"""`FusedLoRAEmbedding` equals PEFT's adapted embedding, with gradients, and is a table of its own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from peft_kernels import FusedLoRAEmbedding
from tests.helpers import relative_error

EXACT = 1e-13
IDS = torch.tensor([[3, 1, 3, 0], [7, 2, 3, 6]])


def trained(dtype: torch.dtype = torch.float32, **options) -> FusedLoRAEmbedding:
    table = FusedLoRAEmbedding(8, 6, 3, dtype=dtype, **options)
    nn.init.normal_(table.lora_embedding_A)
    return table


def pair(padding_idx: int | None, **config) -> tuple[nn.Module, FusedLoRAEmbedding]:
    """PEFT's layer and ours over one table, with equal random values, in float64."""
    peft = pytest.importorskip("peft")
    base = nn.Embedding(8, 6, padding_idx=padding_idx).double()
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], **config)
    theirs = peft.get_peft_model(nn.Sequential(base), settings, autocast_adapter_dtype=False).base_model.model[0]
    ours = FusedLoRAEmbedding.from_embedding(base, 3, lora_alpha=5, use_rslora=settings.use_rslora)
    with torch.no_grad():
        for mine, their in (
            (ours.lora_embedding_A, theirs.lora_embedding_A),
            (ours.lora_embedding_B, theirs.lora_embedding_B),
        ):
            mine.normal_()
            their["default"].copy_(mine)
    return theirs, ours


def gradients(layer: nn.Module, parameters: list[nn.Parameter]) -> list[Tensor]:
    y = layer(IDS)
    return [y, *torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum(), parameters)]


@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_as_in_peft(padding_idx, use_rslora):
    theirs, ours = pair(padding_idx, use_rslora=use_rslora)
    their_parameters = [theirs.lora_embedding_A["default"], theirs.lora_embedding_B["default"]]
    expected = gradients(theirs, their_parameters)
    got = gradients(ours, list(ours.adapter_parameters.values()))
    for one, two in zip(got, expected, strict=True):
        assert relative_error(one, two) < EXACT
    if padding_idx is not None:
        assert not got[1][:, padding_idx].any()
    weight, y = ours.weight, ours(IDS)
    merged = copy.deepcopy(theirs)
    merged.merge()
    assert relative_error(merged(IDS), y) < EXACT
    ours.merge()
    assert relative_error(ours(IDS), y) < EXACT
    plain = ours.to_embedding()
    assert type(plain) is nn.Embedding
    assert plain.padding_idx == ours.padding_idx
    assert relative_error(plain(IDS), y) < EXACT
    assert not plain.weight.requires_grad
    ours.unmerge()
    assert ours.weight is weight
    assert torch.equal(ours(IDS), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_start_and_what_trains(dtype):
    base = nn.Embedding(8, 6, dtype=dtype).eval()
    table = FusedLoRAEmbedding.from_embedding(base, 3)
    assert table.weight is base.weight
    assert not base.weight.requires_grad
    assert not table.training
    assert torch.equal(table(IDS), base(IDS))
    assert table.lora_embedding_A.dtype == torch.float32
    assert table.lora_embedding_A.shape == (3, 8)
    assert abs(table.lora_embedding_B.std() - 1) < 0.5
    table(IDS).float().square().sum().backward()
    assert {name for name, p in table.named_parameters() if p.requires_grad} == set(table.adapter_parameters)
    assert table.lora_embedding_A.grad.any()
    assert table.lora_embedding_A.grad.dtype == torch.float32
    used = table.lora_embedding_A.grad.any(0)
    assert used.tolist() == [i in IDS for i in range(8)]


def test_state():
    source, target = trained(padding_idx=2), trained(padding_idx=2)
    assert list(source.state_dict()) == ["weight", "lora_embedding_A", "lora_embedding_B"]
    state = copy.deepcopy(source.state_dict())
    source.merge()
    assert all(torch.equal(value, state[key]) for key, value in source.state_dict().items())
    target.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(target.weight, state["weight"])
    target.merge()
    assert torch.equal(target(IDS), source(IDS))
    for twin in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        assert repr(twin) == repr(source) == "FusedLoRAEmbedding(8, 6, padding_idx=2, r=3, scaling=5.33333, merged)"
        assert torch.equal(twin(IDS), source(IDS))
        twin.unmerge()
        assert torch.equal(twin.weight, state["weight"])


def test_moves():
    table = trained()
    expected, state = table(IDS), copy.deepcopy(table.state_dict())
    table.merge()
    table.half()
    table.unmerge()
    assert {p.dtype for p in table.parameters()} == {torch.float16}
    assert relative_error(table(IDS), expected) < 1e-2
    table.to("meta").to_empty(device="cpu").float()
    table.load_state_dict(state)
    assert torch.equal(table(IDS), expected)
    assert FusedLoRAEmbedding(2**30, 2**10, 8, device="meta")(
        torch.empty(3, dtype=torch.int64, device="meta")
    ).shape == (3, 2**10)


def test_merged_sum_that_is_not_finite():
    table = trained(torch.float16)
    with torch.no_grad():
        table.lora_embedding_A[0, 3] = 1e6
    weight = table.weight
    for method in (table.merge, table.to_embedding):
        with pytest.raises(ValueError, match="not finite"):
            method()
    assert not table.merged
    assert table.weight is weight


def test_ties_survive_merging():
    """GPT-2's head is the table itself."""
    base, head = nn.Embedding(8, 6), nn.Linear(6, 8, bias=False)
    head.weight = base.weight
    table = FusedLoRAEmbedding.from_embedding(base, 3)
    nn.init.normal_(table.lora_embedding_A)
    before = head.weight.clone()
    table.merge()
    assert torch.equal(head.weight, before)
    table.unmerge()
    assert table.weight is head.weight


class Mine(nn.Embedding):
    pass


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: nn.Embedding(8, 6, max_norm=1.0), ValueError, "max_norm"),
        (lambda: nn.Embedding(8, 6, sparse=True), ValueError, "sparse=True"),
        (lambda: nn.Embedding(8, 6, scale_grad_by_freq=True), ValueError, "scale_grad_by_freq=True"),
        (lambda: Mine(8, 6), TypeError, "Mine"),
        (lambda: nn.Linear(8, 6), TypeError, "Linear"),
        (lambda: nn.EmbeddingBag(8, 6), TypeError, "EmbeddingBag"),
    ],
    ids=["max_norm", "sparse", "scale_grad", "subclass", "linear", "bag"],
)
def test_refused(make, error, text):
    module = make()
    with pytest.raises(error, match=text):
        FusedLoRAEmbedding.from_embedding(module, 2)
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"r": 0}, ValueError, "r is 0"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha"),
        ({"use_rslora": 1}, TypeError, "use_rslora"),
        ({"adapter_dtype": torch.int8}, TypeError, "adapter_dtype"),
        ({"padding_idx": 9}, ValueError, "padding_idx is 9"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        FusedLoRAEmbedding(8, 6, **arguments)
