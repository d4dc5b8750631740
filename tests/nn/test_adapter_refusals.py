"""A file that is refused, or that does not fit the model, changes no bit of the model."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from peft_kernels import add_lora, load_adapter, merge_adapter
from tests.adapter_files import (
    OF_TENSORS,
    SPOILED,
    WEIGHTS,
    A,
    B,
    Spoiled,
    base_model,
    container,
    good_tensors,
    write_folder,
)
from tests.nn.models import disturb, snapshot


def plain() -> nn.Module:
    return base_model()


def adapted() -> nn.Module:
    model = base_model()
    add_lora(model, 2)
    disturb(model)
    return model


def cases() -> list:
    """Tensors are compared with the model's, each kind of which has its own way; everything else is refused before the
    model is looked at: there the two kinds take turns."""
    made = []
    for i, case in enumerate(SPOILED):
        kinds = (plain, adapted) if case in OF_TENSORS else ((plain, adapted)[i % 2],)
        made += [pytest.param(case, make, id=f"{case.id}-{make.__name__}") for make in kinds]
    return made


@pytest.mark.parametrize(("case", "make"), cases())
def test_refused_file_changes_no_bit(tmp_path, case: Spoiled, make):
    folder = write_folder(tmp_path / "adapter")
    case.spoil(folder)
    model = make()
    assert_unchanged = snapshot(model)
    with pytest.raises(case.error) as caught:
        load_adapter(model, folder)
    for text in case.mentions:
        assert text in str(caught.value)
    assert_unchanged()


def other_sizes() -> nn.Module:
    model = base_model()
    model.second = nn.Linear(5, 3)
    return model


def lacking() -> nn.Module:
    model = base_model()
    del model.second
    return model


def one_more() -> nn.Module:
    model = base_model()
    model.third = nn.Sequential()
    model.third.add_module("second", nn.Linear(4, 4))
    return model


def other_kind() -> nn.Module:
    model = base_model()
    model.second = nn.Bilinear(5, 5, 4)
    return model


def other_rank() -> nn.Module:
    model = base_model()
    add_lora(model, 3)
    return model


def other_places() -> nn.Module:
    model = base_model()
    add_lora(model, 2, ["first"])
    return model


def merged() -> nn.Module:
    model = adapted()
    merge_adapter(model)
    return model


def on_meta() -> nn.Module:
    return base_model().to("meta")


UNFIT = {
    other_sizes: ("lora_B of second", "(4, 2)", "3 x 5", "(3, 2)"),
    lacking: ("'second'", "does not have"),
    one_more: ("no tensors for third.second",),
    other_kind: ("second", "Bilinear"),
    other_rank: ("first", "3"),
    other_places: ("'second'", "no target"),
    merged: ("first", "merged"),
    on_meta: ("first", "meta"),
}


@pytest.mark.parametrize(("make", "mentions"), UNFIT.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_model_that_the_file_does_not_fit(tmp_path, make, mentions):
    model = make()
    names, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    assert_unchanged = None if make is on_meta else snapshot(model)
    with pytest.raises(ValueError, match=WEIGHTS) as caught:
        load_adapter(model, write_folder(tmp_path))
    for text in mentions:
        assert text in str(caught.value)
    if assert_unchanged is not None:
        assert_unchanged()
    assert names == list(model.state_dict())
    assert flags == [p.requires_grad for p in model.parameters()]


def test_values_that_overflow_the_layers_dtype(tmp_path):
    model = base_model()
    add_lora(model, 2, adapter_dtype=torch.float16)
    assert_unchanged = snapshot(model)
    write_folder(tmp_path, tensors=good_tensors(**{B: torch.full((5, 2), 1e6)}))
    with pytest.raises(ValueError, match=r"lora_B of first is not finite in torch\.float16"):
        load_adapter(model, tmp_path)
    assert_unchanged()


def test_sizes_are_checked_before_anything_is_read(tmp_path):
    """A consistent file of 64 GiB (sparse) whose tensors do not fit: refused from the header, in no time and memory."""
    folder = write_folder(tmp_path)
    columns = 2**33
    header = {A: {"dtype": "F32", "shape": [2, columns], "data_offsets": [0, 8 * columns]}}
    position = 8 * columns
    for key, tensor in good_tensors().items():
        if key != A:
            header[key] = {
                "dtype": "F32",
                "shape": list(tensor.shape),
                "data_offsets": [position, position + tensor.nbytes],
            }
            position += tensor.nbytes
    start = container(header)
    (folder / WEIGHTS).write_bytes(start)
    try:
        os.truncate(folder / WEIGHTS, len(start) + position)
    except OSError as error:
        pytest.skip(f"the file system has no sparse files of that size: {error}")
    with pytest.raises(ValueError, match="lora_A of first has shape"):
        load_adapter(base_model(), folder)


def test_pickle_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "it ran"),))

    for name in ("adapter_model.bin", WEIGHTS):
        folder = write_folder(tmp_path / name)
        (folder / WEIGHTS).unlink()
        torch.save(Trap(), folder / name)
        with pytest.raises(ValueError, match=name):
            load_adapter(base_model(), folder)
    assert not (tmp_path / "it ran").exists()


def test_good_adapter_helper_is_good(tmp_path):
    """What the refusals start from loads, so that each is refused for its own fault."""
    for make in (plain, adapted):
        model = make()
        load_adapter(model, write_folder(tmp_path))
        assert torch.equal(model.first.lora_B, good_tensors()[B])
        assert model.first.scaling == 1.5
