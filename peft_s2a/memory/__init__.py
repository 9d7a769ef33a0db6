"""What a training step keeps and peaks at: bytes autograd holds for backward, allocator peak, timeline."""

from .accounting import SavedTensor, saved_activation_bytes, saved_tensors
from .allocator import kept_bytes_by_allocator
from .coverage import CoverageReport, CoverageRow, coverage_report
from .peak import optimizer_state_bytes, peak_step_bytes
from .plan import Plan, PlanRow
from .simulation import Allocation, CannotSimulateError, SimulatedStep, simulate_step
from .timeline import Timeline, memory_timeline

__all__ = [
    "Allocation",
    "CannotSimulateError",
    "CoverageReport",
    "CoverageRow",
    "Plan",
    "PlanRow",
    "SavedTensor",
    "SimulatedStep",
    "Timeline",
    "coverage_report",
    "kept_bytes_by_allocator",
    "memory_timeline",
    "optimizer_state_bytes",
    "peak_step_bytes",
    "saved_activation_bytes",
    "saved_tensors",
    "simulate_step",
]
