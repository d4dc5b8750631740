"""Copies of small host tables on a GPU, played without one: made once, waited for by other streams, kept by graphs."""

from __future__ import annotations

import pytest
import torch

from peft_kernels.formats import _device_copies


class Stream:
    def __init__(self) -> None:
        self.waited = []

    def wait_event(self, event) -> None:
        self.waited.append(event)


class Event:
    def record(self, stream) -> None:
        self.stream = stream


class Played:
    """A GPU's current stream and capture state; tensors on it are plain ones that remember their streams."""

    def __init__(self, monkeypatch) -> None:
        self.stream, self.capturing, self.copied, self.recorded = Stream(), False, 0, []
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(_device_copies, "_copies", type(_device_copies._copies)())
        monkeypatch.setattr(_device_copies, "_captured", {})

    def copy(self, number: int):
        host = _Host(number)
        host.played = self
        return _device_copies.on_device(host, bytes([number % 256, number // 256]), torch.device("cuda", 0))


class _Host:
    dtype, shape = torch.int64, torch.Size((1,))

    def __init__(self, number: int) -> None:
        self.number = number

    def pin_memory(self):
        return self

    def to(self, device, non_blocking):
        assert non_blocking
        self.played.copied += 1
        return self

    def record_stream(self, stream) -> None:
        self.played.recorded.append(stream)


@pytest.fixture
def played(monkeypatch):
    return Played(monkeypatch)


def test_a_table_is_copied_once(played):
    first = played.copy(1)
    assert played.copy(1) is first
    assert played.copy(2) is not first
    assert played.copied == 2


def test_another_stream_waits_and_is_remembered(played):
    first, made_on = played.copy(1), played.stream
    played.stream = Stream()
    assert played.copy(1) is first
    (event,) = played.stream.waited
    assert event.stream is made_on
    assert played.recorded == [played.stream]


def test_the_least_recently_used_is_dropped(played):
    kept, dropped = played.copy(0), played.copy(1)
    for number in range(2, _device_copies.MOST + 1):
        played.copy(0)
        played.copy(number)
    assert played.copy(0) is kept
    assert played.copy(1) is not dropped


def test_a_graph_takes_what_is_there_and_keeps_it(played):
    first, made_on = played.copy(1), played.stream
    played.capturing, played.stream = True, Stream()
    assert played.copy(1) is first
    assert not played.stream.waited  # work outside of the capture cannot be waited for inside
    played.capturing, played.stream = False, made_on
    for number in range(2, 2 * _device_copies.MOST):
        played.copy(number)
    assert played.copy(1) is first


def test_a_graph_cannot_be_the_first(played):
    played.capturing = True
    with pytest.raises(RuntimeError, match="run the same call once before"):
        played.copy(1)
    assert played.copied == 0


def test_on_a_cpu_it_is_the_tensor_itself():
    host = torch.zeros(3)
    assert _device_copies.on_device(host, b"", host.device) is host
