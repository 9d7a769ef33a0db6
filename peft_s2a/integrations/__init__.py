"""What connects the library to others: a callback for the `Trainer`, and the command line."""

from .memory_report import MemoryReportCallback

__all__ = ["MemoryReportCallback"]
