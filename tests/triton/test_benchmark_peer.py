"""What the benchmarks time as the Triton kernel's update alone passes their gate."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import gate, many


def test_the_update_alone():
    spec = many.ManySpec(24, 64, 96, 12, torch.float32, adapters=3, ranks=(12, 1, 8), work=many.DELTA)
    (peer,) = (peer for peer in many.PEERS if peer.name == "ours (triton)")
    assert peer.unavailable(spec) is None
    assert gate.check(peer, spec) == "exact mask"
