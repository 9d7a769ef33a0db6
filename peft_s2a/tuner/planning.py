"""Plans: what full fine-tuning, LoRA and S2A need, and which configuration of S2A meets a budget."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PretrainedConfig

from ..memory.budget import format_bytes, parse_bytes
from ..memory.candidates import Candidate, NotApplicableError, Task
from ..memory.plan import Plan, PlanRow, fastest
from ..memory.simulation import MakeOptimizer
from ..precision import Allocation
from ..settings import BIT_LEVELS
from .config import S2AConfig
from .discovery import find_heads, find_targets
from .dry_run import Size
from .shape_model import image_batches, make_shape_model

OPTIMIZERS: Mapping[str, MakeOptimizer] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-3),
    "adam": partial(torch.optim.Adam, lr=1e-3),
    "sgd": partial(torch.optim.SGD, lr=1e-3),
    "momentum": partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
}
"""Optimizers by name, in their default implementation on a CPU, which goes parameter by parameter."""

POLICY = "activation_policy"
POLICIES: tuple[str, ...] = (
    ("keep", "rebuild", "recompute") if POLICY in {field.name for field in fields(S2AConfig)} else ("keep",)
)
"""Ways to have what backward needs, the fastest first."""

LEAST_BITS = 2
"""Fewer are not chosen: one bit is too coarse for most operators."""

_QUERY_VALUE = re.compile(r"(^|\.)(query|value|q_proj|v_proj|q|v|qkv)$")


def plan(
    model: nn.Module | PretrainedConfig | str | Path,
    config: S2AConfig | None = None,
    batch_size: int = 32,
    image_size: Size = None,
    dtype: torch.dtype | str | None = None,
    optimizer: str | MakeOptimizer = "adamw",
    budget: str | int = "8GB",
) -> Plan:
    """Predicts what fine-tuning needs, without data and without the model's memory, and says what fits a budget.

    A step of each candidate runs on fake tensors: full fine-tuning, LoRA (rank 8, on query and value where they have
    the usual names, else on every linear layer and convolution), LoRA with gradient checkpointing, and S2A in each
    policy. Where no policy of S2A fits at the configuration's bits, fewer bits are tried.

    Args:
        model: a module (it stays as it is), a configuration of transformers, or a name or folder; see
            `make_shape_model`.
        config: the configuration of S2A to start from; None: the defaults, with the model's head trained.
        batch_size: images a step.
        image_size: their size; None: the configuration's, or the model's own.
        dtype: dtype of weights and activations, e.g. `torch.bfloat16` or `"bfloat16"`; None: as the model is.
        optimizer: a name of `OPTIMIZERS`, or a function of the trained parameters.
        budget: memory of the device, `"8GB"` or a number of bytes.

    Raises:
        ValueError: for a budget that is below the weights or is not a size, and for a model that takes no images.
        CannotSimulateError: if the model's forward needs data.
    """
    if isinstance(optimizer, str) and optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r} is not one of {', '.join(OPTIMIZERS)}, nor a function.")
    shaped = make_shape_model(model, _dtype(dtype))
    config = copy.deepcopy(config) if config else S2AConfig(modules_to_save=find_heads(shaped) or None)
    if image_size is not None:
        config.image_size = image_size if isinstance(image_size, int) else tuple(image_size)
    task = Task(
        shape_model=partial(copy.deepcopy, shaped),
        batch=image_batches(shaped, config.image_size),
        batch_size=_checked_batch_size(batch_size),
        budget=parse_bytes(budget),
        optimizer=OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer,
    )
    rows, left_out, flops = [], [], None
    for candidate in _usual_candidates(shaped):
        try:
            row, count = task.row(candidate, flops)
        except NotApplicableError as error:
            left_out.append((candidate.name, str(error)))
            continue
        flops = flops or count
        rows.append(row)
    for level in _levels(config):
        new = [task.row(candidate, flops)[0] for candidate in level]
        rows.extend(new)
        if any(row.fits for row in new):
            break
    found = Plan(type(shaped).__name__, task.batch_size, task.budget, tuple(rows), tuple(left_out))
    if task.budget < min(row.weights for row in rows):
        raise ValueError(f"{_below_weights('budget', budget, rows)}")
    return found


def apply_budget(config: S2AConfig, model: nn.Module) -> None:
    """Sets policy and bits of `config` so that a step fits `config.memory_budget`; fills in `config.memory_plan`.

    The fastest policy at the configuration's bits that fits is taken; if none does, fewer bits are tried.

    Raises:
        ValueError: if nothing fits; the message says what would.
    """
    if config.memory_budget is None or config.memory_plan is not None:
        return
    if config.planned_batch_size is None:  # checked when the configuration was made; fields can be changed
        raise ValueError("memory_budget needs planned_batch_size, the number of images in a step, and not None.")
    shaped = make_shape_model(model)
    task = Task(
        shape_model=partial(copy.deepcopy, shaped),
        batch=image_batches(shaped, config.image_size),
        batch_size=config.planned_batch_size,
        budget=parse_bytes(config.memory_budget),
        optimizer=OPTIMIZERS["adamw"],
    )
    rows: list[PlanRow] = []
    for level in _levels(config):
        new = [task.row(candidate)[0] for candidate in level]
        rows.extend(new)
        chosen = fastest([row for row in new if row.fits])
        if chosen is not None:
            _take(config, chosen)
            return
    if task.budget < min(row.weights for row in rows):
        raise ValueError(f"{_below_weights('memory_budget', config.memory_budget, rows)}")
    least = min(rows, key=lambda row: row.peak)
    most = max(rows, key=lambda row: row.largest_batch)
    alternative = (
        f"the largest batch that fits is {most.largest_batch} ({most.name})"
        if most.largest_batch
        else f"one image needs {format_bytes(min(row.smallest_peak for row in rows))}"
    )
    raise ValueError(
        f"memory_budget={config.memory_budget!r} is not met by S2A on {type(model).__name__} with a batch of "
        f"{task.batch_size}: the smallest peak is {format_bytes(least.peak)} ({least.name}), and {alternative}."
    )


def _take(config: S2AConfig, row: PlanRow) -> None:
    config.activation_bits = row.config.activation_bits
    if POLICY in vars(row.config):
        setattr(config, POLICY, getattr(row.config, POLICY))
    config.memory_plan = {
        "configuration": row.name,
        "peak_bytes": row.peak,
        "largest_batch": row.largest_batch,
        "budget_bytes": parse_bytes(config.memory_budget or 0),
        "batch_size": config.planned_batch_size,
    }


def _below_weights(name: str, budget: Any, rows: list[PlanRow]) -> str:
    least = min(rows, key=lambda row: row.smallest_peak)
    return (
        f"{name}={budget!r} is below the weights, which take {format_bytes(min(row.weights for row in rows))}. The "
        f"smallest peak, {least.name} with a batch of 1, is {format_bytes(least.smallest_peak)}."
    )


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if (found is not None and not isinstance(found, torch.dtype)) or (found is None) != (dtype is None):
        raise ValueError(f"dtype={dtype!r} is not a dtype of torch, such as 'float32' or 'bfloat16'.")
    return found


def _checked_batch_size(batch_size: Any) -> int:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be a positive whole number.")
    return batch_size


def _levels(config: S2AConfig) -> Iterator[list[Candidate]]:
    """Candidates of S2A: every policy at the configuration's bits, then at fewer if a number of bits was given.

    Bits that were calibrated stay as they are, with their policy.
    """
    bits = config.activation_bits
    if config.activation_allocation is not None:  # calibrated for one policy
        yield [_s2a_candidate(config, config.activation_policy, bits)]
        return
    levels: list[Any] = [bits]
    if isinstance(bits, int):
        levels += [b for b in sorted(BIT_LEVELS, reverse=True) if LEAST_BITS <= b < bits]
    for level in levels:
        yield [_s2a_candidate(config, policy, level) for policy in POLICIES]


def _s2a_candidate(config: S2AConfig, policy: Any, bits: Any) -> Candidate:
    config = copy.deepcopy(config)
    config.memory_budget = config.planned_batch_size = config.memory_plan = None
    config.activation_bits = bits
    config.activation_backend = "eager"
    if POLICY in vars(config):
        setattr(config, POLICY, policy)
    if config.activation_allocation is not None:
        precision = f"{Allocation.from_dict(config.activation_allocation).average_bits:.2f} bits on average"
    else:
        precision = "exact" if bits is None else f"{bits} bits" if isinstance(bits, int) else "mixed bits"
    name = f"S2A {policy if isinstance(policy, str) else 'mixed'}, {precision}"
    return Candidate(name, lambda model: _adapted(model, config), config, adaptive=True)


def _usual_candidates(model: nn.Module) -> list[Candidate]:
    heads = find_heads(model)
    linear = [name for name in find_targets(model, linear_only=True) if not _in(name, heads)]
    named = [name for name in linear if _QUERY_VALUE.search(name)]
    targets = named or [
        *linear,
        *(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1 and not _in(n, heads)),
    ]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets, modules_to_save=heads or None)
    title = "LoRA q, v" if named else "LoRA"
    return [
        Candidate("full fine-tuning", lambda model: model.requires_grad_(True)),
        Candidate(title, lambda model: _adapted(model, lora), lora),
        Candidate(f"{title} + checkpointing", lambda model: _checkpointed(model, lora), lora),
    ]


def _in(name: str, heads: list[str]) -> bool:
    return any(name == head or name.startswith(f"{head}.") for head in heads)


def _adapted(model: nn.Module, config: Any) -> nn.Module:
    if isinstance(config, LoraConfig) and not config.target_modules:
        raise NotApplicableError("the model has no linear layer or convolution")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user hears of them when the adapter is made in earnest
        adapted: nn.Module = get_peft_model(model, copy.deepcopy(config))
    return adapted


def _checkpointed(model: nn.Module, config: Any) -> nn.Module:
    supported = getattr(model, "supports_gradient_checkpointing", hasattr(model, "set_grad_checkpointing"))
    if not supported:
        raise NotApplicableError("the model class has no gradient checkpointing")
    adapted = _adapted(model, config)
    # switched on last: PEFT would ask for gradients of the embeddings, which these checkpoints do not need
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        enable: Callable[..., Any] | None = getattr(model, name, None)
        if enable is not None:
            enable({"use_reentrant": False})
            return adapted
    model.set_grad_checkpointing(True)  # type: ignore[operator]
    return adapted
