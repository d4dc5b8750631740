"""Where the layers of a model that adapters are for stand: their names as a checkpoint has them, which of them are
meant, and how to put other modules in their places."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from peft_kernels.checks import FLOATS
from peft_kernels.formats.peft_config import LoraSettings
from peft_kernels.formats.strict_json import short
from peft_kernels.nn._layers import is_hooked
from peft_kernels.nn._merge import Mergeable
from peft_kernels.nn._quantised import Quantised
from peft_kernels.nn.embedding import FusedLoRAEmbedding, embedding_objection, is_embedding
from peft_kernels.nn.lora import FusedLoRALinear
from peft_kernels.nn.lora import is_linear as is_dense_linear
from peft_kernels.nn.masked import MaskedLinear
from peft_kernels.nn.nf4 import NF4Linear, is_quantised_linear

# Names that torch.compile, FSDP and activation checkpointing insert into those of the modules that they wrap.
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
# Wrappers that take stock of the parameters when they are built.
_PARAMETER_OWNERS = frozenset(("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"))


class Site(NamedTuple):
    """A module and all names it has in the model: one object can stand in several places."""

    module: Any  # an nn.Module, of the kind that the function returning the site says
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.names[0]

    def __str__(self) -> str:
        return self.name + (f" (also {', '.join(self.names[1:])})" if self.names[1:] else "")


def unwrap(model: Any) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile. TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def all_sites(model: nn.Module) -> list[Site]:
    """Every module of an unwrapped model, under names free of wrappers."""
    names: dict[int, list[str]] = {}
    modules = {}
    for name, module in model.named_modules(remove_duplicate=False):
        clean = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        modules[id(module)] = module
        names.setdefault(id(module), []).append(clean)
    return [Site(module, tuple(names[key])) for key, module in modules.items()]


_FUSED = (FusedLoRALinear, FusedLoRAEmbedding)


def fused_sites(model: nn.Module) -> list[Site]:
    """The adapted layers that adapter files know: linear ones and embeddings."""
    return [site for site in all_sites(model) if isinstance(site.module, _FUSED)]


def mergeable_sites(model: nn.Module) -> list[Site]:
    """All adapted modules, stacks of experts among them."""
    return [site for site in all_sites(model) if isinstance(site.module, Mergeable)]


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, dense, pruned or in 4 bits, that an adapter can be put beside."""
    return is_dense_linear(module) or is_quantised_linear(module) or type(module) is MaskedLinear


def sizes(layer: Any) -> tuple[int, int]:
    """(out_features, in_features) of a layer, adapted or not; (embedding_dim, num_embeddings) of an embedding."""
    if isinstance(layer, (nn.Linear, NF4Linear, MaskedLinear, FusedLoRALinear)):
        return layer.out_features, layer.in_features
    n, k = layer.weight.shape
    return k, n


def has_embedding(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Embedding, FusedLoRAEmbedding))


def check_open(model: nn.Module, where: str) -> None:
    """Refuses models whose linear layers cannot be replaced any more.

    Raises:
        ValueError: the model is wrapped by DDP or FSDP, has PEFT's own adapters, or is itself a linear layer.
    """
    for module in model.modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if kinds & _PARAMETER_OWNERS:
            owner = sorted(kinds & _PARAMETER_OWNERS)[0]
            raise ValueError(f"{where}: {owner} wraps the model and would not see new parameters; wrap it after")
        if "BaseTunerLayer" in kinds:
            raise ValueError(f"{where}: the model has adapters of Hugging Face PEFT already; expected a plain model")
    if is_linear(model) or isinstance(model, FusedLoRALinear):
        raise ValueError(f"{where}: the model is itself a linear layer; use FusedLoRALinear.from_linear")


def find_targets(model: nn.Module, settings: LoraSettings, where: str) -> list[Site]:
    """The layers of an unwrapped model that `settings` names, each one replaceable.

    A module object with several names is a target if one of them is, unless one is excluded. "all-linear" leaves out
    the output embeddings, as PEFT does, and what `skipped_linears` lists.

    Args:
        model: the inside of a model that `check_open` has passed.
        settings: which layers are meant.
        where: what messages begin with.

    Returns:
        The sites in the model's order, those names first that are targets.

    Raises:
        ValueError: there is none, or one cannot be replaced.
    """
    found = []
    for site in all_sites(model):
        names = sorted(site.names, key=lambda name: not settings.targets(name))  # stable
        if site.module is model or not settings.targets(names[0]) or any(map(settings.excludes, names)):
            continue
        if settings.all_linear and not _is_plain_linear(model, site.module):
            continue
        found.append(Site(site.module, tuple(names)))
    if not found:
        raise ValueError(_nothing_found(model, settings, where))
    compiled = compiled_modules(model)
    for site in found:
        reason = _objection(site.module, id(site.module) in compiled, settings)
        if reason is not None:
            raise ValueError(f"{where}: {site.name} {reason}")
    return found


def skipped_linears(model: nn.Module) -> list[str]:
    """Names of linear layers that "all-linear" passes over: subclasses, which may compute something else."""
    return [
        f"{site.name} ({type(site.module).__name__})"
        for site in all_sites(model)
        if isinstance(site.module, nn.Linear) and not is_linear(site.module)
    ]


def put_layers(model: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> None:
    """Puts each value of `layers` into every place of the model where its key stands."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() would leave out a second name
            if child is not None and child in layers:
                setattr(parent, name, layers[child])
        _leave_fast_path(parent)


def put_linears_back(model: nn.Module, kind: type, where: str) -> tuple[str, ...]:
    """Puts what `to_linear` gives into the places of all layers of a kind of ours; the names of the layers, in the
    model's order.

    Raises:
        ValueError: the model is itself such a layer.
        TypeError: `model` is no module.
    """
    model = unwrap(model)
    if isinstance(model, kind):
        raise ValueError(f"{where}: the model is itself a {kind.__name__}; use its to_linear")
    sites = [site for site in all_sites(model) if isinstance(site.module, kind)]
    put_layers(model, {site.module: site.module.to_linear() for site in sites})
    return tuple(site.name for site in sites)


def _leave_fast_path(module: nn.Module) -> None:
    # In inference PyTorch's encoder layer hands linear1.weight and linear2.weight to one fused call that knows neither
    # updates nor 4 bits. A value of 0 here is its own way to say that the call does not apply.
    if isinstance(module, nn.TransformerEncoderLayer):
        ours = (FusedLoRALinear, Quantised)
        if isinstance(module.linear1, ours) or isinstance(module.linear2, ours):
            module.activation_relu_or_gelu = 0
    elif isinstance(module, nn.TransformerEncoder):
        module.use_nested_tensor = False


def output_head(model: Any) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _is_plain_linear(model: Any, module: nn.Module) -> bool:
    return module is not output_head(model) and (is_linear(module) or isinstance(module, FusedLoRALinear))


def _objection(module: nn.Module, compiled: bool, settings: LoraSettings) -> str | None:
    if isinstance(module, _FUSED):
        return f"is a {type(module).__name__} already"
    if is_embedding(module):
        reason = _embedding_objection(module, settings)
        if reason is not None:
            return reason
    elif not is_linear(module):
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        return f"is {kind}; expected exactly nn.Linear, Conv1D or nn.Embedding, or a linear layer in NF4"
    return replacement_objection(module, compiled)


def replacement_objection(module: Any, compiled: bool) -> str | None:
    """Why no other module can take the place of this one, which is of a kind that ours can stand for."""
    if is_hooked(module):
        return "has hooks or a forward of its own, which would be lost; remove them first"
    if compiled:
        return "is compiled by itself, and its compiled code would stay; compile after adding"
    if module.weight.dtype not in FLOATS and not is_quantised_linear(module):
        return f"has a weight of {module.weight.dtype}; expected a floating-point dtype"
    return None


def compiled_modules(model: nn.Module) -> set[int]:
    """ids of the modules inside those that torch.compile wraps."""
    return {id(module._modules["_orig_mod"]) for module in model.modules() if "_orig_mod" in module._modules}


def _embedding_objection(embedding: Any, settings: LoraSettings) -> str | None:
    for option in ("use_dora", "lora_bias"):
        if getattr(settings, option):
            return f"is an embedding, which does not support {option}"
    return embedding_objection(embedding)


def _nothing_found(model: nn.Module, settings: LoraSettings, where: str) -> str:
    asked = settings.target_modules if isinstance(settings.target_modules, str) else list(settings.target_modules)
    message = f"{where}: target_modules = {short(asked)} names no layer"
    if settings.exclude_modules:
        message += f" that exclude_modules = {short(settings.exclude_modules)} leaves"
    if isinstance(settings.target_modules, str) and not settings.all_linear:
        message += " (a string is a regular expression for the whole name; a list holds names or their endings)"
    return f"{message}; linear layers of the model end in {_list_endings(all_sites(model))}"


def _list_endings(sites: Iterable[Site], limit: int = 12) -> str:
    endings = sorted({name.rpartition(".")[2] for site in sites if is_linear(site.module) for name in site.names})
    more = f" and {len(endings) - limit} more" if len(endings) > limit else ""
    return ", ".join(endings[:limit]) + more if endings else "nothing: there are none"
