"""Pytest plugin that runs PEFT's own tests on accelerated layers: the outside check of `integrations/peft.py`.

PEFT's tests are in its source distribution, not in ours:

    pip download peft==0.21.2 --no-binary peft --no-deps --no-build-isolation
    tar xf peft-0.21.2.tar.gz && cd peft-0.21.2 && touch tests/__init__.py
    pip install diffusers datasets parameterized
    PYTHONPATH=<this repository>/tests/integrations python -m pytest -p peft_suite_plugin -o addopts="" \
        -k "LoRA or lora" tests/test_custom_models.py tests/test_mixed.py

Each `lora.Linear` and `lora.Embedding` that PEFT makes is one of ours. The session fails when none of them ran fused.
With `PEFT_KERNELS_STOCK=1` the layers stay as they are, for comparison.

Result on a CPU with peft 0.21.2 and torch 2.13.0, of the tests about DoRA, aLoRA, biases, embeddings, several active
adapters and mixed batches (`-k "(LoRA or lora) and (dora or DoRA or alora or bias or Embedding or multiple_active or
mixed)" tests/test_custom_models.py`; of its 2407 tests the first 2287 ran): 2110 passed, 176 skipped and 1 failed, an
unseeded comparison at a relative 1e-5 that failed again when its class was repeated and passed three times alone.
With `multi_lora_linear`, `-k TestMixedAdapterBatches` of the same file: 34 passed, 2 skipped, 11 calls.
Without groups, DoRA and embeddings the whole of both files had passed as it does without the plugin, 5435 tests, but
for one that wants the hub.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

_CALLS: Counter[str] = Counter()
_KEY = "peft_kernels_calls"


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PEFT_KERNELS_STOCK"):
        return
    from peft.tuners.lora import LoraModel

    from peft_kernels import functional
    from peft_kernels.integrations import _peft_embedding, _peft_groups, _peft_linear, peft
    from peft_kernels.integrations.report import Calls

    inject, record = LoraModel.inject_adapter, _peft_linear.record

    def accelerated(self, model, *args, **kwargs):
        result = inject(self, model, *args, **kwargs)
        for layer in model.modules():
            if type(layer) in peft.FUSED and peft._lasting_objection(layer) is None:
                layer.__class__ = peft.FUSED[type(layer)]
                _CALLS["layers"] += 1
        peft._together(model, Calls())
        return result

    def recorded(layer, reason):
        _CALLS[f"PEFT's own code, {reason}"] += 1
        return record(layer, reason)

    LoraModel.inject_adapter = accelerated
    _peft_linear.record = _peft_embedding.record = recorded
    _peft_groups.SMALL_ON_CPU = 0
    for name in (n for n in functional.__all__ if "lora" in n or n == "dora_linear"):
        setattr(functional, name, _counted(name, getattr(functional, name)))


def _counted(name, original):
    def counted(*args, **kwargs):
        _CALLS["fused calls"] += 1
        _CALLS[f"calls of {name}"] += 1
        return original(*args, **kwargs)

    return counted


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[_KEY] = dict(_CALLS)
    elif not os.environ.get("PEFT_KERNELS_STOCK") and not _CALLS["fused calls"]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    _CALLS.update(getattr(node, "workeroutput", {}).get(_KEY, {}))


def pytest_terminal_summary(terminalreporter) -> None:
    for what, count in sorted(_CALLS.items()):
        terminalreporter.write_line(f"peft_kernels: {count} {what}")
    if not _CALLS["fused calls"]:
        terminalreporter.write_line("peft_kernels: 0 fused calls")
