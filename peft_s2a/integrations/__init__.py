"""What connects the library to others: a callback for the `Trainer`, model cards, the Hub, and the command line."""

from .hub import push_to_hub
from .memory_report import MemoryReportCallback
from .model_card import update_model_card

__all__ = ["MemoryReportCallback", "push_to_hub", "update_model_card"]
