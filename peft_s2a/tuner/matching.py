"""Which module names a configuration means; PEFT's own rules, applied to layers and blocks alike."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from .config import S2AConfig

CHILD_NAME = "s2a"
"""Name of the child module that a block's adapter is; it must not contain the tuner's prefix."""


def matches_names(names: Collection[str] | str | None, key: str) -> bool:
    """Whether a full module name is meant by a list of names (exact, or endings) or by a regular expression."""
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, key) is not None
    return key in names or any(key.endswith(f".{name}") for name in names)


def is_saved_whole(config: S2AConfig, key: str) -> bool:
    """Whether the module lies in one of `modules_to_save`."""
    return any(re.match(rf"(^|.*\.){name}($|\..*)", key) for name in config.modules_to_save or ())


def is_excluded(config: S2AConfig, key: str) -> bool:
    """Whether the module is meant by `exclude_modules` or lies in one of `modules_to_save`."""
    return matches_names(config.exclude_modules, key) or is_saved_whole(config, key)


def is_own(key: str) -> bool:
    """Whether the module is, or lies in, a block's adapter."""
    return CHILD_NAME in key.split(".")


def layer_index(config: S2AConfig, key: str) -> int | None:
    """The layer number in a module name, as `layers_to_transform` counts."""
    if not config.layers_pattern:
        match = re.match(r"(?:.*?\.)?[^.\d][^.]*\.(?P<idx>\d+)(?:\.|$)", key)
        return int(match["idx"]) if match else None
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    for pattern in patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)(?:\.|$)", key)
        if match:
            return int(match["idx"])
    return None


def in_chosen_layers(config: S2AConfig, key: str) -> bool:
    """Whether `layers_to_transform` lets the module through."""
    indices = config.layers_to_transform
    if indices is None or indices == []:
        return True
    index = layer_index(config, key)
    return index is not None and (index == indices if isinstance(indices, int) else index in indices)


def select(config: S2AConfig, names: Collection[str] | str | None, keys: Iterable[str]) -> list[str]:
    """Of the keys, in order, those meant by the names, chosen and not excluded."""
    return [
        key
        for key in keys
        if matches_names(names, key)
        and in_chosen_layers(config, key)
        and not is_excluded(config, key)
        and not is_own(key)
    ]


def exact_pattern(names: Collection[str], keys: Collection[str]) -> str:
    """A regular expression that matches the names and no other of the keys.

    Numbers in names are generalised where that matches nothing else, so that the expression is short and readable.
    """
    chosen = set(names)
    patterns: list[str] = []
    for name in names:
        general = r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))
        if general in patterns:
            continue
        fits = all(key in chosen for key in keys if re.fullmatch(general, key))
        patterns.append(general if fits else re.escape(name))
    return "|".join(patterns)
