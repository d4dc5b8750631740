"""Masks in a file: back bit for bit, whole or not at all, and what is no such file is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_kernels.formats.mask import PackedMask, empty, full, pack
from peft_kernels.formats.mask_file import load_masks, save_masks
from tests.problems.masked import drawn_mask

MASKS = {"b.layer": pack(drawn_mask(5, 70, 0.5)), "a": empty(3, 64), "every": full(1, 1), "none": full(0, 9)}


@pytest.fixture
def file(tmp_path) -> Path:
    return save_masks(tmp_path / "new" / "masks.safetensors", MASKS)


def test_round_trip(file):
    loaded = load_masks(str(file))
    assert list(loaded) == sorted(MASKS)
    for name, mask in MASKS.items():
        assert loaded[name].equal(mask), name
        assert loaded[name].shape == mask.shape
    # A bit a weight and little more: both tensors' entries in the header.
    assert file.stat().st_size < sum(mask.nbytes for mask in MASKS.values()) + 8 * 200
    assert os.listdir(file.parent) == [file.name]


def test_views_and_shared_memory(tmp_path):
    mask = MASKS["b.layer"]
    save_masks(tmp_path / "m", {"one": mask, "same": mask, "rows": mask.rows(1, 3)})
    loaded = load_masks(tmp_path / "m")
    assert loaded["one"].equal(mask)
    assert loaded["same"].equal(mask)
    assert loaded["rows"].equal(mask.rows(1, 3))


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99], ids=str)
def test_a_file_cut_short(file, part):
    data = file.read_bytes()
    file.write_bytes(data[: int(part * len(data))])
    with pytest.raises(ValueError, match=r"masks.safetensors: .*truncated"):
        load_masks(file)


def with_tensors(change):
    def rewrite(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return rewrite


BROKEN = {
    "too few columns": (lambda t: t.update({"a.words": t["a.words"][:, :1].clone()}), r"a.words.*\(3, 1\).*3 x 64"),
    "too few rows": (lambda t: t.update({"a.words": t["a.words"][:2].clone()}), r"a.words.*\(2, 2\)"),
    "no shape": (lambda t: t.pop("a.shape"), "no 'a.shape'"),
    "no words": (lambda t: t.pop("a.words"), "no 'a.words'"),
    "floats": (lambda t: t.update({"a.words": t["a.words"].float()}), "F32"),
    "bytes": (lambda t: t.update({"a.words": t["a.words"].to(torch.uint8)}), r"a.words.*uint8.*int32"),
    "shape of three": (lambda t: t.update({"a.shape": torch.ones(3, dtype=torch.int64)}), r"a.shape.*\(2,\)"),
    "negative": (lambda t: t.update({"none.shape": torch.tensor([0, -9])}), "none.words"),
    "another tensor": (lambda t: t.update({"a.mask": t["a.words"].clone()}), "unexpected tensor 'a.mask'"),
    "bits beyond": (lambda t: t["every.words"].fill_(3), "every.words.*beyond column 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_such_file(file, name):
    change, text = BROKEN[name]
    with_tensors(change)(file)
    with pytest.raises(ValueError, match=text) as raised:
        load_masks(file)
    assert str(file) in str(raised.value)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_masks(tmp_path / "none")


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_write_leaves_what_was_there(file, monkeypatch, function):
    def full_disk(*arguments, **options):
        raise OSError(28, "No space left on device")

    before = file.read_bytes()
    monkeypatch.setattr(os, function, full_disk)
    with pytest.raises(OSError, match="No space"):
        save_masks(file, {"other": full(9, 9)})
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize(
    ("masks", "error", "text"),
    [
        ({"a": torch.ones(2, 2)}, TypeError, "save_masks: a is Tensor"),
        ({"a": PackedMask(torch.zeros(2, 2, dtype=torch.int32), torch.Size((2, 5)))}, ValueError, "a.words has shape"),
        ({1: full(2, 2)}, TypeError, "the name 1 is int"),
    ],
    ids=["tensor", "shape", "name"],
)
def test_nothing_is_written_of_what_is_no_mask(tmp_path, masks, error, text):
    with pytest.raises(error, match=text):
        save_masks(tmp_path / "m", masks)
    assert not os.listdir(tmp_path)
