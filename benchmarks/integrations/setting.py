"""What the cases share: a fresh model and batch, adapted models, and how outputs and gradients are compared."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from benchmarks.integrations.architectures import ARCHITECTURES, BIAS_ONLY, Architecture
from peft_s2a import S2AConfig


class Refused(Exception):
    """The base model, without an adapter, cannot be used so; the message says why."""


@dataclass
class Setting:
    """One architecture, the same weights and data for the same name.

    Attributes:
        base: the model without an adapter, in eval mode.
        batch: two items with labels.
    """

    architecture: Architecture
    base: nn.Module
    batch: dict[str, Any]

    @classmethod
    def of(cls, name: str) -> Setting:
        torch.manual_seed(0)
        architecture = ARCHITECTURES[name]
        return cls(architecture, architecture.make().eval(), architecture.batch())

    def config(self, bias_only: bool = False, **fields: Any) -> S2AConfig:
        own = BIAS_ONLY if bias_only else self.architecture.fields
        return S2AConfig(modules_to_save=list(self.architecture.head) or None, **(own | fields))

    def adapt(self, base: nn.Module | None = None, bias_only: bool = False, **fields: Any) -> Any:
        """A copy of the base model under a fresh adapter."""
        base = copy.deepcopy(self.base) if base is None else base
        torch.manual_seed(0)  # of the adapter's own random start
        base = copy.deepcopy(self.base) if base is None else base
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*neither trained nor saved")
            return get_peft_model(base, self.config(bias_only, **fields))

    def trained(self, base: nn.Module | None = None, bias_only: bool = False, **fields: Any) -> Any:
        """The same with every part of the adapter away from its start, in eval mode."""
        return disturb(self.adapt(base, bias_only, **fields)).eval()

    def to(self, dtype: torch.dtype) -> Setting:
        batch = {k: v.to(dtype) if _is_floating(v) else v for k, v in self.batch.items()}
        return Setting(self.architecture, copy.deepcopy(self.base).to(dtype), batch)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def is_bias_only(setting: Setting) -> bool:
    """Whether prompts and side branches do not suit the architecture."""
    return setting.architecture.fields == BIAS_ONLY


def disturb(model: Any, adapter_name: str = "default", scale: float = 0.1) -> Any:
    """Moves every part of an adapter away from its start, always the same way."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "s2a_" in name and name.endswith(f".{adapter_name}"):
                parameter.add_((torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype))
    return model


def scores(model: Any, batch: dict[str, Any], **kwargs: Any) -> Tensor:
    """The model's scores, without gradients."""
    with torch.no_grad():
        output = model(**batch, **kwargs)
    found: Tensor = output.logits_per_image if "logits_per_image" in output else output.logits
    return found


def trainable(model: Any) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(model: Any, batch: dict[str, Any]) -> Tensor:
    """All gradients of one training step, in one vector; each parameter that is trained must have one."""
    model.train().zero_grad()
    model(**batch).loss.backward()
    found = {name: parameter.grad for name, parameter in trainable(model).items()}
    missing = [name for name, gradient in found.items() if gradient is None]
    assert not missing, f"no gradient: {missing[:3]}"
    whole = torch.cat([gradient.detach().flatten().float() for gradient in found.values() if gradient is not None])
    assert torch.isfinite(whole).all()
    return whole


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
