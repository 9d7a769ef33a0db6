"""S2A (arXiv 2503.08154) for PEFT: fine-tuning that shrinks activations as well as gradients and optimizer state.

Importing the package registers the method with PEFT: `get_peft_model(model, S2AConfig(...))` and
`PeftModel.from_pretrained(...)` know it from then on.
"""

from .codecs.backend import explain_backend
from .integrations import MemoryReportCallback, push_to_hub, update_model_card
from .memory import Plan, coverage_report, peak_step_bytes, saved_activation_bytes
from .precision import Allocation
from .settings import ActivationSettings
from .structure import BlockShape
from .tuner import S2AConfig, S2AModel, calibrate, plan, register

__version__ = "0.1.0"

register(S2AConfig, S2AModel)

__all__ = [
    "ActivationSettings",
    "Allocation",
    "BlockShape",
    "MemoryReportCallback",
    "Plan",
    "S2AConfig",
    "S2AModel",
    "__version__",
    "calibrate",
    "coverage_report",
    "explain_backend",
    "peak_step_bytes",
    "plan",
    "push_to_hub",
    "saved_activation_bytes",
    "update_model_card",
]
