"""Other libraries' models on this library's kernels. Nothing here imports those libraries before it is asked to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from peft_kernels.integrations.report import Report

__all__ = ["accelerate", "restore"]


def accelerate(model: nn.Module, *, strict: bool = False, groups: bool = True) -> Report:
    """Runs the LoRA of a Hugging Face PEFT model through `peft_kernels.functional`, in place.

    No parameter, buffer or module is renamed, replaced or copied: only the class of each supported layer changes, to a
    subclass that overrides `forward`. state_dict, optimizers, saving, loading, merging, adding and switching adapters
    work as before. Supported are linear layers (also Conv1D, and bitsandbytes' `Linear4bit` in NF4, whose weight is
    multiplied from its 4 bits) and embeddings, with one or several active adapters, rsLoRA, `lora_bias`, trained
    biases, frozen A or B, MiCA, DoRA (one base matmul instead of two or three) and activated LoRA (a mask, no gather).
    Batches in which every sample names its adapter (`adapter_names`, as in PEFT; "__base__" for none) run all adapters
    of a layer at once (`functional.multi_lora_linear`), and in training mode too, which PEFT refuses: every adapter
    gets the gradient of training alone on its own samples. transformers' gradient checkpointing takes the names along,
    `torch.utils.checkpoint` called by the model itself does not: there PEFT's hooks are gone when it computes again.
    What is not supported (`Report` says what and why) runs PEFT's own code, decided at every call, and each reason is
    logged once, as a warning of the logger "peft_kernels".

    Numbers equal PEFT's up to rounding, with four differences by design: float32 adapters beside a 16-bit base weight
    are rounded to 16 bits for the products, instead of x being widened to float32 (their gradients are summed in
    float32); `lora_dropout` draws other, equally distributed masks; DoRA's dropout leaves the base matmul whole,
    where PEFT drops x for the part (g - 1) x Wᵀ as well (the same expectation, with less variance); and over a 4-bit
    weight the adapters, too, see x in bitsandbytes' compute dtype (bfloat16, say, though a norm has made x float32).
    Second derivatives raise RuntimeError.

    Args:
        model: a `PeftModel`, or any model that holds PEFT's LoRA layers. Call it again after adding an adapter that
            targets new modules; layers that are accelerated already stay so.
        strict: raise instead of running PEFT's code: now, for any layer that would, and at every later call. Calls that
            have nothing to fuse (adapters disabled or merged) do not raise later.
        groups: compute layers together that the model calls on one x, such as q/k/v: x is read and kept once for all
            (`functional.lora_linear_group`). And compute gated feed-forward blocks whole, whose class changes as well
            (`functional.lora_swiglu_mlp`). Which these are is read off the source of the parents' `forward`; hooks run
            as before. Not for problems so small that a CPU takes longer so; and under `torch.compile` blocks only.

    Returns:
        A `Report` that prints as a table of the layers.

    Raises:
        ImportError: `peft` is not installed.
        TypeError: model is not a `torch.nn.Module`.
        RuntimeError: no layer can be fused, or with `strict` not every one. The model is unchanged.
    """
    return _peft().accelerate(model, strict=strict, groups=groups)


def restore(model: nn.Module) -> int:
    """Undoes `accelerate`: every layer runs PEFT's own code again. A model that is not accelerated stays as it is.

    Args:
        model: what was given to `accelerate`, or a model that contains it.

    Returns:
        The number of layers that were restored.

    Raises:
        ImportError: `peft` is not installed.
        TypeError: model is not a `torch.nn.Module`.
        RuntimeError: FSDP2 has wrapped a layer since. The model is unchanged.
    """
    return _peft().restore(model)


def _peft():
    try:
        from peft_kernels.integrations import peft
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] != "peft":
            raise
        raise ImportError(
            "peft_kernels.accelerate works on models of Hugging Face PEFT, which is not installed; "
            "install it with: pip install 'peft-kernels[peft]'",
            name="peft",
        ) from error
    return peft
