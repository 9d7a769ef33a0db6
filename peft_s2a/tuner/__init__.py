"""The PEFT method: configuration, layers and tuner, under PEFT's own names."""

from .batch_norm import BatchNormLayer
from .block import BlockAdapter
from .calibration import calibrate
from .config import S2AConfig
from .layer import AttentionBiasLayer, BiasLayer, S2ALayer
from .model import S2AModel
from .planning import plan
from .registration import register

__all__ = [
    "AttentionBiasLayer",
    "BatchNormLayer",
    "BiasLayer",
    "BlockAdapter",
    "S2AConfig",
    "S2ALayer",
    "S2AModel",
    "calibrate",
    "plan",
    "register",
]
