"""What `adapter_config.json` of Hugging Face PEFT says about a LoRA adapter, and which layers it names.

The rules for names are PEFT's (`check_target_module_exists` and `get_pattern_key` of version 0.21), so that a file
means the same layers, ranks and factors there and here.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from peft_kernels.checks import check_finite, check_probability, check_rank
from peft_kernels.formats.strict_json import short

ALL_LINEAR = "all-linear"
MAX_ALPHA = 1e6

Names = tuple[str, ...] | str

_REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
_OPTIONAL = ("lora_dropout", "use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
             "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights")  # fmt: skip
# Where the adapter came from and how it was started and trained: nothing that a trained adapter computes.
_IGNORED = ("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config",
            "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
            "task_type")  # fmt: skip
# What would make the adapter compute something that this library does not, and the values that mean "not used".
_UNSUPPORTED: dict[str, tuple] = {
    "alora_invocation_tokens": (None, []), "arrow_config": (None,), "bias": ("none", "lora_only"),
    "ensure_weight_tying": (False,), "kasa_config": (None,), "layer_replication": (None, []),
    "megatron_config": (None,), "modules_to_save": (None, []), "monteclora_config": (None,),
    "target_parameters": (None, []), "trainable_token_indices": (None, [], {}), "use_bdlora": (None, False),
    "use_qalora": (False,), "velora_config": (None,),
}  # fmt: skip
# The other ways of starting an adapter (PiSSA, OLoRA, CorDA, LoftQ, ...) change the base model's weights as well.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraSettings:
    """The meaning of an adapter's configuration. Field names and defaults as PEFT's, but for `train_bias`.

    Attributes:
        r: rank, where `rank_pattern` has no other.
        lora_alpha: scaling = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`; see `alpha_pattern`.
        target_modules: names or name endings of the adapted layers; a string is a regular expression for the whole
            name, or "all-linear".
        exclude_modules: names, endings or an expression, of layers that are not adapted although they are targets.
        rank_pattern, alpha_pattern: rank and alpha by regular expression for the name or its ending; first match wins.
        use_dora: the rows of the adapted weights have trained lengths (DoRA).
        lora_bias: the updates have biases.
        train_bias: the biases of the adapted layers are trained too (PEFT's bias = "lora_only").
        layers_to_transform: only layers with these numbers, when `target_modules` is a list.
        layers_pattern: names of the module lists that those numbers count in; any when empty.
    """

    r: int
    lora_alpha: float
    target_modules: Names
    exclude_modules: Names | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    train_bias: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()

    @property
    def all_linear(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def excludes(self, name: str) -> bool:
        return self.exclude_modules is not None and _matches(self.exclude_modules, name)

    def targets(self, name: str) -> bool:
        """Whether the module called `name` is adapted. "all-linear" names every module: only the caller sees types."""
        if self.excludes(name):
            return False
        if self.all_linear:
            return True
        if not _matches(self.target_modules, name):
            return False
        exact = isinstance(self.target_modules, str) or name in self.target_modules
        return exact or not self.layers_to_transform or self._layer_number(name) in self.layers_to_transform

    def _layer_number(self, name: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        match = next(filter(None, (re.match(pattern, name) for pattern in patterns)), None)
        return int(match[1]) if match else None

    def rank_of(self, name: str) -> int:
        return next((r for pattern, r in self._ranks if pattern.match(name)), self.r)

    def alpha_of(self, name: str) -> float:
        return next((alpha for pattern, alpha in self._alphas if pattern.match(name)), self.lora_alpha)

    # Compiled once: a pattern for each layer of a large model would overflow the cache of the `re` module.
    @functools.cached_property
    def _ranks(self) -> list[tuple[re.Pattern, int]]:
        return [(_suffix_pattern(key), r) for key, r in self.rank_pattern.items()]

    @functools.cached_property
    def _alphas(self) -> list[tuple[re.Pattern, float]]:
        return [(_suffix_pattern(key), alpha) for key, alpha in self.alpha_pattern.items()]

    def unused_patterns(self, names: Iterable[str]) -> list[str]:
        """The keys of `rank_pattern` and `alpha_pattern` that match none of `names`."""
        names = list(names)
        keys = {**self.rank_pattern, **self.alpha_pattern}
        return [key for key in keys if not any(_suffix_pattern(key).match(name) for name in names)]


def checked_settings(where: str, **fields) -> LoraSettings:
    """Builds `LoraSettings` from a caller's or a file's values, lists for tuples and None for defaults allowed.

    Args:
        where: what the messages begin with.
        fields: the fields of `LoraSettings`.

    Raises:
        ValueError: a value out of range: 1 <= r <= 512, a finite alpha of at most 1e6 in size, a probability in [0, 1],
            at least one target, valid regular expressions.
        TypeError: a value of the wrong type.
    """
    fields = {key: value for key, value in fields.items() if value is not None}
    for key in ("target_modules", "exclude_modules"):
        if key in fields:
            fields[key] = _checked_names(where, key, fields[key])
    if not fields.get("target_modules"):
        raise ValueError(f"{where}: target_modules is empty; expected names, a regular expression or {ALL_LINEAR!r}")
    for key in ("use_rslora", "use_dora", "lora_bias", "train_bias", "fan_in_fan_out"):
        if not isinstance(fields.get(key, False), bool):
            raise TypeError(f"{where}: {key} is {short(fields[key])}; expected true or false")
    if fields.get("use_dora") and fields.get("lora_bias"):
        raise ValueError(f"{where}: lora_bias is set together with use_dora, which has no place for it")
    check_rank(where, "r", fields["r"])
    _check_alpha(where, "lora_alpha", fields["lora_alpha"])
    check_probability(where, "lora_dropout", fields.get("lora_dropout", 0.0))
    for key, check in (("rank_pattern", check_rank), ("alpha_pattern", _check_alpha)):
        _check_patterns(where, key, fields.get(key, {}), check)
    _set_layer_numbers(where, fields)
    return LoraSettings(**fields)


def parse_config(config: dict, path: Path) -> LoraSettings:
    """Reads the contents of an `adapter_config.json`.

    Args:
        config: the parsed JSON object.
        path: the file it came from, for messages.

    Returns:
        The settings.

    Raises:
        ValueError: a key is missing, unknown, out of range or of the wrong type, or asks for something that this
            library does not compute; the message names the file and the key.
    """
    for key in _REQUIRED:
        if config.get(key) is None:
            raise ValueError(f"{path}: {key} is missing")
    if config["peft_type"] != "LORA":
        raise ValueError(f"{path}: peft_type is {short(config['peft_type'])}; expected 'LORA'")
    for key, value in config.items():
        if key in _UNSUPPORTED and value not in _UNSUPPORTED[key]:
            allowed = " or ".join(map(json.dumps, _UNSUPPORTED[key]))
            raise ValueError(f"{path}: {key} is {short(value)}, which is not supported; expected {allowed}")
        known = key in (*_REQUIRED, *_OPTIONAL, *_IGNORED, *_UNSUPPORTED)
        if not known and value is not None and value is not False:  # a newer PEFT's option that is off is harmless
            raise ValueError(f"{path}: the key {short(key)} is unknown; it may change what the adapter computes")
    init = config.get("init_lora_weights")
    if init not in _HARMLESS_INITS:
        raise ValueError(
            f"{path}: init_lora_weights is {short(init)}, which may have changed the base model's weights too; "
            "convert the adapter with PEFT first (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    fields = {key: config.get(key) for key in (*_REQUIRED, *_OPTIONAL) if key not in ("peft_type", "init_lora_weights")}
    try:
        return checked_settings(str(path), train_bias=config.get("bias") == "lora_only", **fields)
    except TypeError as error:
        raise ValueError(str(error)) from error


def to_config(settings: LoraSettings, *, base_model: str | None, task_type: str | None) -> dict:
    """The contents of an `adapter_config.json` that PEFT and vLLM read with the meaning of `settings`.

    Args:
        settings: what the adapter is.
        base_model: name or path of the model it was trained on, if known.
        task_type: PEFT's task type, such as "CAUSAL_LM", or None.

    Returns:
        A dict that `json.dumps` accepts.
    """
    names = settings.target_modules
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "r": settings.r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "target_modules": names if isinstance(names, str) else list(names),
        "exclude_modules": None,
        "rank_pattern": dict(settings.rank_pattern),
        "alpha_pattern": dict(settings.alpha_pattern),
        "use_rslora": settings.use_rslora,
        "fan_in_fan_out": settings.fan_in_fan_out,
        "init_lora_weights": True,
        "bias": "lora_only" if settings.train_bias else "none",
        "lora_bias": settings.lora_bias,
        "use_dora": settings.use_dora,
        "modules_to_save": None,
    }


def _matches(names: Names, name: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return name in names or any(name.endswith(f".{ending}") for ending in names)


def _suffix_pattern(key: str) -> re.Pattern:
    return re.compile(rf"(.*\.)?({key})$")


def _checked_names(where: str, key: str, names: object) -> Names:
    if isinstance(names, str):
        if names.lower() != ALL_LINEAR:
            _check_expression(where, key, names)
        return names
    if not isinstance(names, (list, tuple, set, frozenset)) or not all(isinstance(n, str) and n for n in names):
        raise TypeError(f"{where}: {key} is {short(names)}; expected a list of names, or one regular expression")
    return tuple(sorted(names) if isinstance(names, (set, frozenset)) else names)


def _check_expression(where: str, key: str, expression: str) -> None:
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{where}: {key}: {short(expression)} is not a regular expression: {error}") from error


def _check_patterns(where: str, key: str, patterns: object, check) -> None:
    if not isinstance(patterns, Mapping) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{where}: {key} is {short(patterns)}; expected a mapping from regular expressions to numbers")
    for pattern, value in patterns.items():
        _check_expression(where, key, rf"(.*\.)?({pattern})$")
        check(where, f"{key}[{short(pattern)}]", value)


def _check_alpha(where: str, name: str, alpha) -> None:
    check_finite(where, name, alpha)
    if abs(alpha) > MAX_ALPHA:
        raise ValueError(f"{where}: {name} is {short(alpha)}; expected at most {MAX_ALPHA:g} in size")


def _set_layer_numbers(where: str, fields: dict) -> None:
    numbers, patterns = fields.get("layers_to_transform"), fields.get("layers_pattern", ())
    numbers = (numbers,) if type(numbers) is int else numbers
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    if numbers is not None:
        if not isinstance(numbers, (list, tuple)) or not all(type(number) is int for number in numbers):
            raise TypeError(f"{where}: layers_to_transform is {short(numbers)}; expected integers")
        if numbers and isinstance(fields["target_modules"], str):
            raise ValueError(f"{where}: layers_to_transform needs target_modules to be a list of names")
        fields["layers_to_transform"] = tuple(numbers)
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{where}: layers_pattern is {short(patterns)}; expected names")
    for pattern in patterns:
        _check_expression(where, "layers_pattern", rf"(?:^|.*?\.){pattern}\.(\d+)\.")
    fields["layers_pattern"] = tuple(pattern for pattern in patterns if pattern)
