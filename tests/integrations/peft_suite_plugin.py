"""Pytest plugin that runs PEFT's own tests on accelerated layers: the outside check of `integrations/peft.py`.

PEFT's tests are in its source distribution, not in ours:

    pip download peft==0.21.2 --no-binary peft --no-deps --no-build-isolation
    tar xf peft-0.21.2.tar.gz && cd peft-0.21.2 && touch tests/__init__.py
    pip install diffusers datasets parameterized
    PYTHONPATH=<this repository>/tests/integrations python -m pytest -p peft_suite_plugin -o addopts="" \
        -k "LoRA or lora" tests/test_custom_models.py tests/test_mixed.py

Each `lora.Linear` that PEFT makes is one of ours. The session fails when none of them ran fused. With
`PEFT_KERNELS_STOCK=1` the layers stay as they are, for comparison.

Result on a CPU with peft 0.21.2 and torch 2.13.0: 5435 passed and 1 failed, as without the plugin (that test wants the
hub); 916 fused calls, and all kinds of fallback.
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
    import peft.tuners.lora.model as lora_model

    from peft_kernels import functional
    from peft_kernels.integrations import _peft_linear as linear

    dispatch, record = lora_model.dispatch_default, linear.record

    def accelerated(*args, **kwargs):
        layer = dispatch(*args, **kwargs)
        if type(layer) is linear.Linear:
            layer.__class__ = linear.FusedPeftLinear
            _CALLS["layers"] += 1
        return layer

    def recorded(layer, reason):
        _CALLS[f"PEFT's own code, {reason}"] += 1
        return record(layer, reason)

    lora_model.dispatch_default = accelerated
    linear.record = recorded
    for name in ("lora_linear", "lora_linear_group"):
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
