"""A callback of transformers' `Trainer` that logs predicted and measured memory."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..memory import CannotSimulateError, optimizer_state_bytes, peak_step_bytes, saved_tensors, simulate_step
from ..memory.running import Batch, model_device, tensors_in

MB = 1e6
MOST_OPERATORS = 5
"""Operators that are named; the others are summed."""


class MemoryReportCallback(TrainerCallback):
    """Logs memory in MB (10⁶ bytes) with the first logs: `trainer.add_callback(MemoryReportCallback())`.

    Measured once, after the first step, on that step's batch; the step itself and those that follow run as without it.

    - `memory_peak_predicted_mb`: weights, optimizer state, activations and temporaries of a step, from fake tensors;
      left out, with a warning, for a model that needs data.
    - `memory_peak_measured_mb`: the same from the allocator. On CUDA it is that of the first step; on a CPU two more
      steps run for it, whose gradients are dropped; left out there with several processes.
    - `memory_kept_mb`: what autograd keeps for backward, and `memory_kept_<operator>_mb` for the largest operators.

    They are in the progress bar's log lines and in `log_history` of `trainer_state.json`.
    """

    def __init__(self) -> None:
        self.report: dict[str, float] = {}
        self._handle: Any = None
        self._batch: Batch | None = None
        self._logged = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """Waits for the first batch."""
        self._logged = False
        self.report = {}
        if model is None or not state.is_world_process_zero:
            return
        device = model_device(model, ())
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._handle = model.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._batch is None and model.training:
            self._batch = args or kwargs

    def on_step_end(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Measures after the first step."""
        self._stop_waiting()
        if self._batch is None or model is None:
            return
        batch, self._batch = self._batch, None
        self.report = _report(model, batch, optimizer, alone=args.world_size == 1)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Lets go of the model."""
        self._stop_waiting()
        self._batch = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Adds the report to the first logs after it was made."""
        if self._logged or not self.report or logs is None:
            return
        self._logged = True
        logs.update(self.report)
        if state.log_history:
            state.log_history[-1].update(self.report)

    def _stop_waiting(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _report(model: nn.Module, batch: Batch, optimizer: Any, alone: bool) -> dict[str, float]:
    """The numbers of `MemoryReportCallback`.

    Args:
        optimizer: the optimizer, whose state is there by now.
        alone: whether this is the only process.
    """
    device = model_device(model, batch)
    state = 0 if optimizer is None else optimizer_state_bytes(optimizer)
    report: dict[str, float] = {}
    if device.type == "cuda":  # before anything else runs
        report["memory_peak_measured_mb"] = torch.cuda.max_memory_allocated(device) / MB
    elif alone:
        loaded = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *tensors_in(batch)))
        report["memory_peak_measured_mb"] = (loaded + state + peak_step_bytes(model, batch)) / MB
    try:
        step = simulate_step(model, batch)
        report["memory_peak_predicted_mb"] = (step.peak + state) / MB
    except CannotSimulateError as error:
        warnings.warn(f"The peak is not predicted: {error}", stacklevel=2)
    operators: dict[str, float] = {}
    for saved in saved_tensors(model, batch):
        name = _operator_name(saved.operator)
        operators[name] = operators.get(name, 0.0) + saved.bytes / MB
    report["memory_kept_mb"] = sum(operators.values())
    largest = sorted(operators, key=lambda name: -operators[name])
    for name in largest[:MOST_OPERATORS]:
        report[f"memory_kept_{name}_mb"] = operators[name]
    if largest[MOST_OPERATORS:]:
        report["memory_kept_rest_mb"] = sum(operators[name] for name in largest[MOST_OPERATORS:])
    return {name: round(value, 3) for name, value in report.items()}


def _operator_name(node: str) -> str:
    """`"layer_norm"` for the autograd node `"NativeLayerNormBackward0"`, `"norm"` for `"NormFunctionBackward"`."""
    name = re.sub(r"(Function)?Backward\d*$", "", node).removeprefix("Native")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower() or "unknown"
