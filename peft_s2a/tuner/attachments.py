"""What hangs on the base model once, whatever the number of adapters: interception, image size, hooks."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .. import blockwise
from ..interception import ActivationInterceptor
from .batch_norm import hold_batch_norms, release_batch_norms, takes_batch_statistics
from .block import remove_hooks
from .calibration import CALIBRATIONS, Calibration, calibrations
from .checkpointing import prepare_checkpointing, release_checkpointing
from .config import S2AConfig
from .discovery import find_blocks
from .image_size import ImageSize
from .layer import S2ALayer
from .matching import is_own, is_saved_whole

INTERCEPTOR = "_s2a_interceptor"
IMAGE_SIZE = "_s2a_image_size"


def image_size(model: nn.Module) -> ImageSize:
    """The base model's record of the image being processed, made and hooked up at the first call."""
    record: ImageSize | None = vars(model).get(IMAGE_SIZE)
    if record is None:
        record = ImageSize()
        setattr(model, IMAGE_SIZE, record)
        model.register_forward_pre_hook(record.observe, with_kwargs=True)
    return record


def interceptor(model: nn.Module) -> ActivationInterceptor:
    """The base model's interceptor, made at the first call."""
    found: ActivationInterceptor | None = vars(model).get(INTERCEPTOR)
    if found is None:
        found = ActivationInterceptor()
        setattr(model, INTERCEPTOR, found)
    return found


def install(model: nn.Module, adapter_name: str, config: S2AConfig) -> None:
    """Sets interception and batch norms up for an adapter that has just been made in the model."""
    activation = interceptor(model)
    activation.set_adapter_settings(adapter_name, config.activation_settings())
    activation.layer = next(module for module in model.modules() if isinstance(module, S2ALayer))
    for name, module in model.named_modules():
        # any part may be recomputed by a checkpoint of its own
        if any(module.children()) and not is_own(name) and not isinstance(module, BaseTunerLayer):
            activation.attach(module, name)
    known = calibrations(model)
    known[adapter_name] = Calibration(model, adapter_name, config, activation)
    for calibration in known.values():
        calibration.wait()
    for name in find_blocks(model):
        blockwise.install(model.get_submodule(name), activation, takes_batch_statistics)
    trained = {
        module
        for name, module in model.named_modules()
        if is_saved_whole(config, name) or ".modules_to_save." in f".{name}."
    }
    hold_batch_norms(model, trained)
    prepare_checkpointing(model)


def forget(model: nn.Module, adapter_name: str) -> None:
    """Drops what an adapter that has been deleted had set up."""
    calibration = calibrations(model).pop(adapter_name, None)
    if calibration is not None:
        calibration.stop_waiting()
    found: ActivationInterceptor | None = vars(model).get(INTERCEPTOR)
    if found is not None:
        found.delete_adapter_settings(adapter_name)


def remove(model: nn.Module) -> None:
    """Undoes `install`."""
    for calibration in vars(model).pop(CALIBRATIONS, {}).values():
        calibration.stop_waiting()
    found: ActivationInterceptor | None = vars(model).get(INTERCEPTOR)
    if found is not None:
        found.detach()
        delattr(model, INTERCEPTOR)
    record: ImageSize | None = vars(model).get(IMAGE_SIZE)
    if record is not None:
        remove_hooks(model, record)
        delattr(model, IMAGE_SIZE)
    for module in model.modules():
        blockwise.remove(module)
    release_batch_norms(model)
    release_checkpointing(model)
