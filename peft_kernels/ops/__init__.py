"""The library's ops: every schema, kernel and fake kernel, registered in one place.

`<op>.SCHEMAS` maps an op's name to its schema, `<op>.KERNELS` to (kernel, fake kernel). The kernel asks
`dispatch` which implementation runs. Autograd stays outside, in `<op>.py`: a Function around the registered op costs
18 µs a call, `register_autograd` 58 (docs/design.md).
"""

from __future__ import annotations

import torch

from peft_kernels.ops import lora_linear, philox_dropout, splitk_reduce

NAMESPACE = "peft_kernels"

MODULES = (lora_linear, philox_dropout, splitk_reduce)

SCHEMAS = {name: schema for module in MODULES for name, schema in module.SCHEMAS.items()}

_library = torch.library.Library(NAMESPACE, "DEF")


def _register() -> None:
    for module in MODULES:
        for name, schema in module.SCHEMAS.items():
            kernel, fake = module.KERNELS[name]
            _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
            _library.impl(name, kernel, "CompositeExplicitAutograd")
            torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


_register()
