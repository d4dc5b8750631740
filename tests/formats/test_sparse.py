"""Compressed weights: what is kept keeps its bits, everything else is 0, and files that lie are refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_kernels.formats import nf4, sparse
from peft_kernels.formats.mask import empty, pack
from tests.problems.masked import drawn_mask
from tests.problems.sparse import drawn_blocks, two_of_four

BF16, F32 = torch.bfloat16, torch.float32
N, K = 75, 101
LAYOUTS = ("bitmap", "csr", "2:4", "block", "nf4+bitmap")


def kept_for(layout: str, n: int = N, k: int = K, density: float = 0.4) -> torch.Tensor:
    if layout == "2:4":
        return two_of_four(n, k, 3)
    return drawn_blocks(n, k, 32, density, 5) if layout == "block" else drawn_mask(n, k, density, 5)


def drawn(n: int = N, k: int = K, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1)).to(dtype)


def made(layout: str, dtype: torch.dtype = F32, **options) -> tuple[sparse.SparseWeight, torch.Tensor]:
    """A weight, and what it is in full by PyTorch's own functions."""
    kept, weight = kept_for(layout), drawn(dtype=dtype)
    if layout == "nf4+bitmap":
        q = nf4.quantize(weight)
        return sparse.compress(q, mask=pack(kept), **options), torch.where(kept, q.dequantize(), 0)
    weight = torch.where(kept, weight, 0)
    return sparse.compress(weight, layout, block=32, **options), weight


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_has_the_bits_of_the_weight(layout, dtype):
    weight, dense = made(layout, dtype)
    assert weight.layout == layout
    assert (weight.shape, weight.dtype) == ((N, K), dtype)
    assert torch.equal(bits(weight.dense()), bits(dense))
    assert torch.equal(weight.dense(torch.float64), dense.double()) or layout == "nf4+bitmap"
    if hasattr(weight, "dense_rows"):
        assert torch.equal(weight.dense_rows(13, 70), dense[13:70])
    if hasattr(weight, "dense_columns"):
        assert torch.equal(weight.dense_columns(37, 99), dense[:, 37:99])
    again = sparse.from_numbers(weight.layout, weight.tensors, weight.numbers, dtype)
    assert torch.equal(bits(again.dense()), bits(dense))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_in_memory(layout):
    """As the module says: bytes of a 16-bit weight at its density, and what rounding up to whole blocks costs."""
    kept, size = kept_for(layout, 512, 1024), 512 * 1024
    weight = torch.where(kept, drawn(512, 1024, BF16), 0)
    if layout == "nf4+bitmap":
        found = sparse.compress(nf4.quantize(weight), mask=pack(kept))
        expected = 0.125 + found.density / 2 + 1 / 64 + 0.02
    else:
        found = sparse.compress(weight, layout, block=32)
        extra = {"bitmap": 0.125, "csr": 0.02, "2:4": 0.125, "block": 0.01}[layout]
        expected = extra + 2 * found.density * {"bitmap": 1.2, "csr": 2.0}.get(layout, 1)
    assert found.nbytes <= expected * size
    assert found.density == pytest.approx(0.5 if layout == "2:4" else kept.float().mean().item(), abs=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_special_numbers(layout):
    """Infinity and NaN are kept, -0 is not; with a mask what lies outside has no effect."""
    weight = torch.zeros(64, 64)
    weight[0, 0], weight[0, 1], weight[40, 2] = math.inf, math.nan, -0.0
    found = sparse.compress(weight, layout, block=32).dense()
    assert torch.equal(bits(found[0]), bits(weight[0]))
    assert not bits(found[1:]).any()
    weight[0, 2:] = math.nan
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[0, :2] = True
    masked = sparse.compress(weight, layout, block=32, mask=pack(mask)).dense()
    assert torch.equal(bits(masked), bits(found))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (33, 129), (0, 8), (8, 0)], ids=str)
def test_every_shape_and_an_empty_mask(layout, shape):
    kept = kept_for(layout, *shape)
    weight = drawn(*shape)
    source = nf4.quantize(weight) if layout == "nf4+bitmap" else weight
    name = "bitmap" if layout == "nf4+bitmap" else layout
    dense = source.dequantize() if layout == "nf4+bitmap" else weight
    found = sparse.compress(source, name, block=32, mask=pack(kept))
    assert torch.equal(found.dense(), torch.where(kept, dense, 0))
    nothing = sparse.compress(source, name, block=32, mask=empty(*shape))
    assert nothing.dense().eq(0).all()
    assert nothing.dense().shape == shape


def test_structure_of_blocks():
    """Rows and columns see the same blocks; the longest lines come first."""
    kept = torch.zeros(96, 160, dtype=torch.bool)
    for row, column in ((2, 4), (0, 1), (2, 0), (2, 1)):
        kept[32 * row, 32 * column] = True
    weight = sparse.compress(torch.where(kept, 1.0, 0.0), "block", block=32)
    s = weight.structure
    assert s.row_starts.tolist() == [0, 1, 1, 4]
    assert s.columns.tolist() == [1, 0, 1, 4]
    assert s.block_rows.tolist() == [0, 2, 2, 2]
    assert s.column_starts.tolist() == [0, 1, 3, 3, 3, 4]
    assert s.rows.tolist() == [2, 0, 2, 2]
    assert s.order.tolist() == [1, 0, 2, 3]
    assert s.long_rows.tolist() == [2, 0, 1]
    assert s.long_columns.tolist() == [1, 0, 4, 2, 3]
    assert weight.starts.tolist() == [*s.row_starts.tolist(), *s.column_starts.tolist()]
    assert weight.starts.device.type == "cpu"


def test_a_mask_keeps_blocks_of_zeros():
    """They may train; without a mask they are dropped."""
    mask = pack(drawn_blocks(64, 64, 32, 1.0, 1))
    assert sparse.compress(torch.zeros(64, 64), "block", block=32, mask=mask).values.shape[0] == 4
    assert sparse.compress(torch.zeros(64, 64), "block", block=32).values.shape[0] == 0


def test_2_4_says_how_many_groups_are_too_full():
    weight = torch.where(two_of_four(8, 16, 1), 1.0, 0.0)
    weight[2, :3] = 1
    weight[5, 4:8] = 1
    with pytest.raises(ValueError, match="2 of 32 groups of four neighbours have more than two numbers other than 0"):
        sparse.compress(weight, "2:4")
    kept = two_of_four(8, 16, 1)
    assert torch.equal(sparse.compress(weight, "2:4", mask=pack(kept)).dense(), torch.where(kept, weight, 0))


def test_2_4_along_both_directions_is_noticed():
    both = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).repeat(2, 3).float()
    rows = torch.tensor([[1.0, 1, 0, 0]]).repeat(8, 3)
    assert sparse.compress(both, "2:4").transposable
    assert not sparse.compress(rows, "2:4").transposable
    assert not sparse.compress(both, "2:4", keep_transpose=False).transposable


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layout": "coo"}, ValueError, "layout is 'coo'; expected one of 'bitmap', 'csr', '2:4', 'block'"),
        ({"layout": "block", "block": 48}, ValueError, "block is 48; expected 32, 64 or 128"),
        ({"weight": torch.zeros(8)}, ValueError, r"weight has shape \(8,\)"),
        ({"weight": torch.zeros(8, 8, dtype=torch.int32)}, TypeError, "dtype torch.int32"),
        ({"mask": empty(8, 9)}, ValueError, r"mask has shape \(8, 9\)"),
        ({"weight": nf4.quantize(torch.ones(8, 8)), "layout": "block"}, TypeError, "only layout 'bitmap' takes"),
    ],
)
def test_compress_refuses(change, error, message):
    arguments = {"weight": torch.zeros(8, 8), "layout": "bitmap", **change}
    with pytest.raises(error, match=message):
        sparse.compress(**arguments)


@pytest.fixture
def file(tmp_path):
    weights = {f"layers.{i}.{layout}": made(layout)[0] for i, layout in enumerate(LAYOUTS)}
    sparse.save(weights, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", weights


def test_save_and_load(file):
    path, weights = file
    loaded = sparse.load(path)
    assert loaded.keys() == weights.keys()
    for name, weight in weights.items():
        assert type(loaded[name]) is type(weight)
        assert loaded[name].numbers == weight.numbers
        for mine, theirs in zip(weight.tensors, loaded[name].tensors, strict=True):
            assert torch.equal(mine, theirs)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing is left beside it


def test_a_file_cut_short_is_refused(file):
    path, _ = file
    data = path.read_bytes()
    for length in (0, 7, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"model.safetensors: truncated or corrupt"):
            sparse.load(path)


def test_a_failed_save_leaves_the_old_file(file, monkeypatch):
    path, weights = file
    before = path.read_bytes()
    monkeypatch.setattr("peft_kernels.formats._sparse_files.save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sparse.save(weights, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def changed(layout: str, index: int, change) -> dict:
    weight, _ = made(layout)
    tensors = [t.clone() for t in weight.tensors]
    tensors[index] = change(tensors[index])
    return {f"w.tensor.{i}": t for i, t in enumerate(tensors)}, weight


def put(place: int, value: int):
    def change(tensor):
        tensor.view(-1)[place] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("layout", "index", "change", "message"),
    [
        ("block", 0, lambda t: t[:-1], "expected torch.int32"),
        ("block", 1, put(5, 99), "block columns|contradict"),
        ("block", 1, put(5, -1), "block (row|column)s -1 to"),
        ("block", 1, put(-1, 7), "block rows"),
        ("block", 2, put(1, 3), "contradict each other"),
        ("2:4", 1, put(0, 0), "not two different ones in order"),
        ("2:4", 0, lambda t: t[:, :-1], "values have shape"),
        ("bitmap", 2, put(1, 100000), "starts are not what the bits say"),
        ("bitmap", 3, put(0, 1), "each of 75 rows once"),
        ("bitmap", 1, put(0, 255), "contradict the bits|not what the bits say"),
        ("csr", 0, lambda t: t[:-1], "columns have"),
        ("csr", 1, put(2, K + 1), "columns 0 to 102"),
        ("csr", 1, put(2, -5), "columns 0 to 65531"),
        ("csr", 1, put(1, 0), "not in order, or one occurs twice"),
        ("csr", 1, put(0, K), "not in order, or one occurs twice"),
        ("csr", 0, put(-1, 1), "beyond the last column"),
        ("csr", 2, put(3, 1), "starts do not ascend"),
        ("csr", 2, put(0, 1), "starts do not ascend"),
        ("csr", 2, put(-1, 1), "starts do not ascend"),
        ("csr", 2, lambda t: t[:-1], "starts have"),
        ("nf4+bitmap", 0, lambda t: t[:-1], "codes have"),
        ("nf4+bitmap", 1, put(3, -1), "row_starts|beyond the last column"),
        ("nf4+bitmap", 3, lambda t: t[:1], "absmax"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path, layout, index, change, message):
    tensors, weight = changed(layout, index, change)
    entry = {"layout": weight.layout, "dtype": str(weight.dtype), "numbers": weight.numbers}
    metadata = {"peft_kernels.sparse": "1", "peft_kernels.sparse:w": json.dumps(entry)}
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "f", metadata=metadata)
    with pytest.raises(ValueError, match=message):
        sparse.load(tmp_path / "f")


def test_a_file_of_something_else_is_refused(file, tmp_path):
    path, _ = file
    tensors = load_file(path)
    save_file(tensors, tmp_path / "plain")
    with pytest.raises(ValueError, match="holds no compressed weights"):
        sparse.load(tmp_path / "plain")
    save_file(tensors, tmp_path / "unnamed", metadata={"peft_kernels.sparse": "1"})
    with pytest.raises(ValueError, match="tensors of no weight"):
        sparse.load(tmp_path / "unnamed")
    metadata = {"peft_kernels.sparse": "1", "peft_kernels.sparse:w": '{"layout": "coo"}'}
    save_file({}, tmp_path / "unknown", metadata=metadata)
    with pytest.raises(ValueError, match="no layout, dtype and numbers"):
        sparse.load(tmp_path / "unknown")
