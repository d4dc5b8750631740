"""The reader takes what PEFT writes and refuses all else by name; the writer leaves the old or the new adapter."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from peft_kernels.formats import peft_adapter, whole_files
from peft_kernels.formats.peft_adapter import open_adapter, write_adapter
from peft_kernels.formats.peft_config import LoraSettings, checked_settings, parse_config
from peft_kernels.formats.safetensors_file import read_header, read_tensors
from tests.adapter_files import (
    CONFIG,
    SPOILED,
    WEIGHTS,
    A,
    Spoiled,
    container,
    good_config,
    good_data,
    good_header,
    good_tensors,
    write_folder,
)


def read(folder: Path, adapter_name: str = "default"):
    with open_adapter(folder, adapter_name) as adapter:
        return adapter.settings, adapter.read()


def test_good_adapter_is_read(tmp_path):
    settings, layers = read(write_folder(tmp_path))
    assert settings == LoraSettings(r=2, lora_alpha=3, target_modules=("first", "second"))
    assert sorted(layers) == ["first", "second"]
    for name, matrices in layers.items():
        for matrix, tensor in matrices.items():
            assert torch.equal(tensor, good_tensors()[f"base_model.model.{name}.{matrix}.weight"])


@pytest.mark.parametrize("case", SPOILED, ids=lambda case: case.id)
def test_refused_by_name(tmp_path, case: Spoiled):
    folder = write_folder(tmp_path / "adapter")
    case.spoil(folder)
    with pytest.raises(case.error) as caught:
        read(folder)
    assert type(caught.value) is case.error
    for text in case.mentions:
        assert text in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_keys_of_compiled_models_and_without_prefix_are_understood(tmp_path):
    for prefix in ("", "_orig_mod.", "base_model.model._orig_mod.", "_orig_mod.base_model.model."):
        tensors = {prefix + key.removeprefix("base_model.model."): value for key, value in good_tensors().items()}
        _, layers = read(write_folder(tmp_path, tensors=tensors))
        assert sorted(layers) == ["first", "second"]


def test_every_key_that_peft_writes_is_known(tmp_path):
    peft = pytest.importorskip("peft")
    peft.LoraConfig(r=2, target_modules=["first"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert len(config) > 35
    assert parse_config(config, tmp_path).r == 2


def test_options_of_a_newer_peft_may_be_off(tmp_path):
    config = good_config(use_something_new=False, something_new_config=None)
    assert read(write_folder(tmp_path, config))[0].r == 2


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/tmp/victim", "a\\b", "a.b", "x" * 65, "a\n", "é", None]
)
def test_adapter_names_that_could_leave_the_folder(tmp_path, name):
    write_folder(tmp_path / "here")
    with pytest.raises(ValueError, match="adapter_name"):
        read(tmp_path / "here", name)
    with pytest.raises(ValueError, match="adapter_name"):
        write_adapter(tmp_path / "here", good_config(), {}, name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [CONFIG, WEIGHTS, "here"]


def test_named_adapter_whose_folder_links_out(tmp_path):
    write_folder(tmp_path / "outside")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "task").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="out of its folder"):
        read(tmp_path / "here", "task")
    before = (tmp_path / "outside" / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match="out of its folder"):
        write_adapter(tmp_path / "here", good_config(), {"first": {"lora_A": torch.ones(2, 6)}}, "task")
    assert (tmp_path / "outside" / WEIGHTS).read_bytes() == before


def test_hub_cache_links_to_its_blobs(tmp_path):
    folder = write_folder(tmp_path / "models--x" / "snapshots" / "abc")
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(blobs / f"{name}-digest")
        (folder / name).symlink_to(Path("../../blobs") / f"{name}-digest")
    assert sorted(read(folder)[1]) == ["first", "second"]


def test_pickle_beside_safetensors_is_not_touched(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"not even a pickle")
    assert sorted(read(tmp_path)[1]) == ["first", "second"]


def test_file_that_changes_between_header_and_data(tmp_path):
    write_folder(tmp_path)
    with open_adapter(tmp_path) as adapter:
        (tmp_path / WEIGHTS).write_bytes(save(good_tensors(**{A: torch.zeros(2, 6).double()})))
        with pytest.raises(ValueError, match=WEIGHTS):
            adapter.read()


def test_data_that_are_not_what_the_header_said(tmp_path):
    path = write_folder(tmp_path) / WEIGHTS
    with open(path, "rb") as file:
        infos = read_header(file, path)
        with pytest.raises(ValueError, match="changed while it was read"):
            read_tensors(file, {**infos, A: infos[A]._replace(shape=(6, 2))}, path)


def test_read_tensors_own_their_memory(tmp_path):
    write_folder(tmp_path)
    with open_adapter(tmp_path) as adapter:
        layers = adapter.read()
    (tmp_path / WEIGHTS).write_bytes(bytes((tmp_path / WEIGHTS).stat().st_size))
    assert torch.equal(layers["first"]["lora_A"], good_tensors()[A])


class TestHeader:
    """The parser against arbitrary bytes: a ValueError, or what the safetensors library reads too."""

    @staticmethod
    def parse(data: bytes, folder: Path):
        path = folder / "fuzz.safetensors"
        path.write_bytes(data)
        with open(path, "rb") as file:
            infos = read_header(file, path)
            return infos, read_tensors(file, infos, path)

    def agrees(self, data: bytes, folder: Path) -> None:
        try:
            infos, tensors = self.parse(data, folder)
        except ValueError:
            return
        theirs = load_file(folder / "fuzz.safetensors")
        assert tensors.keys() == infos.keys() == theirs.keys()
        assert all(torch.equal(tensors[key], theirs[key]) for key in theirs)

    @settings(max_examples=60, deadline=None)
    @given(data=st.binary(max_size=200))
    def test_any_bytes(self, tmp_path_factory, data):
        self.agrees(data, tmp_path_factory.mktemp("any"))

    @settings(max_examples=60, deadline=None)
    @given(position=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.integers(0, 30))
    def test_one_byte_changed_and_some_cut(self, tmp_path_factory, position, byte, cut):
        data = bytearray(container(good_header(), good_data()))
        data[position % len(data)] = byte
        self.agrees(bytes(data[: len(data) - cut]), tmp_path_factory.mktemp("changed"))

    sizes = st.integers(-2, 2**65) | st.floats() | st.none() | st.booleans()

    @settings(max_examples=60, deadline=None)
    @given(
        header=st.dictionaries(
            st.sampled_from(["a", "b", "__metadata__"]),
            st.fixed_dictionaries(
                {
                    "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "BOOL", ""]),
                    "shape": st.lists(st.integers(0, 3) | sizes, max_size=3),
                    "data_offsets": st.lists(st.integers(0, 40) | sizes, min_size=1, max_size=3),
                }
            ),
        ),
        data=st.binary(max_size=40),
    )
    def test_any_entries(self, tmp_path_factory, header, data):
        self.agrees(container(header, data), tmp_path_factory.mktemp("entries"))

    @settings(max_examples=40, deadline=None)
    @given(shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4), half=st.booleans())
    def test_what_the_library_writes_is_read(self, tmp_path_factory, shapes, half):
        dtype = torch.bfloat16 if half else torch.float32
        tensors = {f"t{i}": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)}
        infos, got = self.parse(save(tensors), tmp_path_factory.mktemp("right"))
        assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {k: i.shape for k, i in infos.items()}
        assert all(torch.equal(got[key], tensors[key]) for key in tensors)


class TestNames:
    """Names mean the same layers, ranks and alphas as in PEFT."""

    NAMES = (
        "h.0.attn.c_attn", "h.1.attn.c_attn", "h.1.mlp.c_proj", "h.11.mlp.c_proj", "c_attn", "xc_attn", "h", "lm_head",
        "layers.1.experts.0.up",
    )  # fmt: skip
    CONFIGS = (
        {"target_modules": ["c_attn"]},
        {"target_modules": ["attn.c_attn", "lm_head"], "exclude_modules": ["h.1.attn.c_attn"]},
        {"target_modules": r".*\.(c_attn|c_proj)", "exclude_modules": r"h\.0\..*"},
        {"target_modules": "c_attn"},
        {"target_modules": ["c_attn", "c_proj"], "layers_to_transform": 1},
        {"target_modules": ["c_attn", "c_proj"], "layers_to_transform": [0, 11], "layers_pattern": "h"},
        {"target_modules": ["c_proj", "up"], "layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
        {"target_modules": ["h.1.mlp.c_proj"], "layers_to_transform": [0]},
        {"target_modules": ["c_proj"], "layers_to_transform": []},
    )

    @pytest.mark.parametrize("fields", CONFIGS, ids=str)
    def test_targets(self, fields):
        peft = pytest.importorskip("peft")
        from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

        theirs, ours = peft.LoraConfig(**fields), checked_settings("test", r=8, lora_alpha=8, **fields)
        for name in self.NAMES:
            found = check_target_module_exists(theirs, name)
            expected = bool(found) and not isinstance(found, _ExcludedModule)
            assert ours.targets(name) == expected, name

    def test_patterns(self):
        pytest.importorskip("peft")
        from peft.utils.other import get_pattern_key

        for pattern in (
            {"c_attn": 3},
            {"h.1.attn.c_attn": 3, "c_attn": 5},
            {"^c_attn": 4},
            {r"h\.1\..*": 2},
            {"mlp": 1},
        ):
            ours = checked_settings(
                "t", r=8, lora_alpha=8, target_modules=["x"], rank_pattern=pattern, alpha_pattern=pattern
            )
            for name in self.NAMES:
                expected = pattern.get(get_pattern_key(pattern.keys(), name), 8)
                assert ours.rank_of(name) == ours.alpha_of(name) == expected, (pattern, name)


class TestWrite:
    layers: ClassVar = {"first": {"lora_A": torch.ones(2, 6), "lora_B": torch.ones(5, 2, dtype=torch.bfloat16)}}

    def test_contents(self, tmp_path):
        folder = write_adapter(tmp_path / "new" / "folder", good_config(), self.layers)
        assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]
        assert json.loads((folder / CONFIG).read_text()) == good_config()
        tensors = load_file(folder / WEIGHTS)
        assert {key: tensor.dtype for key, tensor in tensors.items()} == {
            A: torch.float32,
            "base_model.model.first.lora_B.weight": torch.bfloat16,
        }

    def test_named_adapters_have_folders_of_their_own(self, tmp_path):
        assert write_adapter(tmp_path, good_config(), self.layers, "task_1") == tmp_path / "task_1"
        assert sorted(os.listdir(tmp_path / "task_1")) == [CONFIG, WEIGHTS]

    def test_respects_the_umask(self, tmp_path):
        before = os.umask(0o027)
        try:
            write_adapter(tmp_path, good_config(), self.layers)
        finally:
            os.umask(before)
        assert {(tmp_path / name).stat().st_mode & 0o777 for name in (CONFIG, WEIGHTS)} == {0o640}

    def test_a_link_is_replaced_not_followed(self, tmp_path):
        (tmp_path / "victim").write_text("untouched")
        (tmp_path / "here").mkdir()
        (tmp_path / "here" / WEIGHTS).symlink_to(tmp_path / "victim")
        write_adapter(tmp_path / "here", good_config(), self.layers)
        assert (tmp_path / "victim").read_text() == "untouched"
        assert not (tmp_path / "here" / WEIGHTS).is_symlink()

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_non_finite_is_refused(self, tmp_path, value):
        layers: ClassVar = {"first": {"lora_A": torch.full((2, 6), value), "lora_B": torch.ones(5, 2)}}
        with pytest.raises(ValueError, match="lora_A of first holds non-finite"):
            write_adapter(tmp_path / "new", good_config(), layers)
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("existing", [True, False], ids=["over an old one", "fresh"])
    @pytest.mark.parametrize("call", range(6))
    @pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["OSError", "Ctrl-C"])
    def test_whatever_fails_the_old_adapter_stays(self, tmp_path, monkeypatch, existing, call, error):
        """The n-th of the system calls that a save makes fails: each file is flushed, then renamed, config first."""
        if existing:
            write_folder(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        calls = []

        def failing(function):
            def call_or_fail(*args, **kwargs):
                calls.append(function.__name__)
                if len(calls) - 1 == call:
                    raise error
                return function(*args, **kwargs)

            return call_or_fail

        for name in ("fsync", "replace"):
            monkeypatch.setattr(peft_adapter.os, name, failing(getattr(os, name)))
        expected = ["fsync", "fsync", "replace", "replace", "fsync"][: call + 1]
        if call >= 5:
            write_adapter(tmp_path, good_config(r=7), self.layers)
            return
        with pytest.raises(type(error)):
            write_adapter(tmp_path, good_config(r=7), self.layers)
        assert calls[: call + 1] == expected
        after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        if call < 4:
            assert after == before
        else:  # both renames were done; only the folder's own flush failed
            assert sorted(after) == [CONFIG, WEIGHTS]
            assert json.loads(after[CONFIG])["r"] == 7

    def test_a_write_cut_short(self, tmp_path, monkeypatch):
        write_folder(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

        class Full:
            def __init__(self, file):
                self.file = file

            def __enter__(self):
                return self

            def __exit__(self, *args):
                self.file.close()

            def write(self, data):
                self.file.write(data[: len(data) // 2])
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(whole_files, "open", lambda *args: Full(Path.open(*args)), raising=False)
        with pytest.raises(OSError, match="No space"):
            write_adapter(tmp_path, good_config(r=7), self.layers)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
