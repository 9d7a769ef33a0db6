"""Turns a configuration into names and shapes for one model, before anything of the model is touched."""

from __future__ import annotations

import warnings

from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from ..structure import BlockShape, is_batch_norm, is_supported
from .config import S2AConfig
from .discovery import find_blocks, find_heads, find_targets, own_modules
from .dry_run import Usage, dry_run
from .matching import exact_pattern, in_chosen_layers, is_excluded, is_saved_whole, matches_names, select
from .shapes import find_block_shapes


def resolve(config: S2AConfig, model: nn.Module) -> None:
    """Fills in `target_modules`, `block_modules`, `block_shapes` and `batch_norm_modules`.

    Raises:
        ValueError: if a list or expression matches nothing, or shapes cannot be found.
    """
    keys = [name for name, _ in own_modules(model) if name]
    found = _find_targets(config, model, keys)
    used = _resolve_blocks(config, model, keys)
    if found:
        _resolve_targets(config, model, keys, found, used)
    _resolve_batch_norms(config, model)
    if not config.inference_mode:
        warn_about_head(config, model)


def _is_all_linear(config: S2AConfig) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def _find_targets(config: S2AConfig, model: nn.Module, keys: list[str]) -> list[str]:
    """Layers found by structure where the configuration asks for it; checks what it names otherwise."""
    if not config.use_bias:
        config.target_modules = []
        return []
    names = config.target_modules
    if names is None or _is_all_linear(config):
        found = find_targets(model, linear_only=names is not None)
        chosen = [k for k in found if in_chosen_layers(config, k) and not is_excluded(config, k)]
        if not chosen:
            raise NoMatchingPeftModuleError(
                f"{type(model).__name__} has no linear, convolution or norm layer to put a bias delta on "
                "(exclude_modules, modules_to_save and layers_to_transform considered): name layers in target_modules "
                "or set use_bias=False."
            )
        return chosen
    named = select(config, names, keys)
    if not named:
        raise NoMatchingPeftModuleError(
            f"target_modules={names} matches no module of {type(model).__name__} (exclude_modules, modules_to_save and "
            f"layers_to_transform considered). Its layers are named like {keys[len(keys) // 2]!r}; use None for all."
        )
    return named


def _resolve_targets(
    config: S2AConfig, model: nn.Module, keys: list[str], found: list[str], used: Usage | None
) -> None:
    """Names the layers that were found, without those that no output of the model depends on.

    Such layers (a pooler whose output the head does not take) would have parameters that never get a gradient, which
    distributed training refuses. Models that cannot be run on an image keep all.
    """
    if used is None and not config.inference_mode:
        try:
            used = dry_run(model, config.image_size, lambda probe: None)
        except ValueError:  # neither a model of images nor of tokens: nothing is known of what it uses
            used = None
    bypassed = [name for name in found if used is not None and name in used.bypassed]
    if bypassed:
        warnings.warn(
            f"{len(bypassed)} layers such as {bypassed[0]} are left alone: {type(model).__name__} uses their weights "
            "without calling them, so that a bias delta on them would have no effect.",
            UserWarning,
            stacklevel=2,
        )
    is_named = config.target_modules is not None and not _is_all_linear(config)
    chosen = [name for name in found if name not in bypassed and (used is None or is_named or name in used.behind)]
    if bypassed or not is_named:
        config.target_modules = exact_pattern(chosen or ([] if is_named else found), keys)


def _resolve_blocks(config: S2AConfig, model: nn.Module, keys: list[str]) -> Usage | None:
    """Names the blocks and finds their shapes; returns what is in use where a dry run was made for that."""
    wanted = config.uses_blocks()
    named = config.block_modules is not None
    if config.block_modules is None:
        found = [k for k in find_blocks(model) if in_chosen_layers(config, k) and not is_excluded(config, k)]
    else:
        found = select(config, config.block_modules, keys)
    if wanted and not found:
        cause = f"block_modules={config.block_modules} matches no module" if named else "no repeated blocks were found"
        raise NoMatchingPeftModuleError(
            f"{cause} of {type(model).__name__} (exclude_modules, modules_to_save and layers_to_transform considered). "
            "Name the blocks in block_modules, or train without prompt and side branch: prompt_rank=0, "
            "side_reduction=0."
        )
    modules = dict(own_modules(model))
    layers = [name for name in found if is_supported(modules[name])]
    if wanted and layers:
        raise ValueError(
            f"block_modules matches {layers[:3]}, which are single layers: name blocks that hold several layers."
        )
    if not wanted:
        config.block_modules = exact_pattern(found, keys)
        return None
    shapes = {name: BlockShape.from_dict(shape) for name, shape in (config.block_shapes or {}).items()}
    missing = [name for name in found if name not in shapes]
    used: Usage | None = None
    if missing:
        new, used = find_block_shapes(model, missing, required=named, image_size=config.image_size)
        shapes |= new
    config.block_shapes = {name: shapes[name].to_dict() for name in found if name in shapes}
    config.block_modules = exact_pattern(list(config.block_shapes), keys)
    return used


def _resolve_batch_norms(config: S2AConfig, model: nn.Module) -> None:
    if not config.train_batch_norm:
        config.batch_norm_modules = None
        return
    names = [name for name, module in own_modules(model) if is_batch_norm(module) and module.track_running_stats]
    config.batch_norm_modules = [n for n in names if not is_excluded(config, n) and in_chosen_layers(config, n)]


def warn_about_head(config: S2AConfig, model: nn.Module) -> None:
    """Warns of a head that is neither trained nor saved: a new head would stay at its random start."""
    heads = [head for head in find_heads(model) if not is_saved_whole(config, head)]
    targeted = [name for name, _ in own_modules(model) if matches_names(config.target_modules, name)]
    heads = [head for head in heads if not any(n == head or n.startswith(f"{head}.") for n in targeted)]
    if heads and not config.modules_to_save:
        warnings.warn(
            f"The head of {type(model).__name__} ({', '.join(heads)}) is neither trained nor saved with the adapter. "
            f"To train it pass modules_to_save={heads!r}.",
            UserWarning,
            stacklevel=2,
        )
