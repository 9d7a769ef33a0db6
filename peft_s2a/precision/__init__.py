"""How many bits each operator gets: what its errors do to the gradient, and the best use of a number of bits."""

from .allocation import GROUPINGS, Allocation, GroupBits, allocate
from .gradient import (
    Arguments,
    ErrorProbe,
    GradientProbe,
    Loss,
    first_items,
    quiet_training,
    single_items,
)
from .processes import agreed
from .sensitivity import Operator, Rebuilding, Sensitivity, instance_groups, kind_groups, measure

__all__ = [
    "GROUPINGS",
    "Allocation",
    "Arguments",
    "ErrorProbe",
    "GradientProbe",
    "GroupBits",
    "Loss",
    "Operator",
    "Rebuilding",
    "Sensitivity",
    "agreed",
    "allocate",
    "first_items",
    "instance_groups",
    "kind_groups",
    "measure",
    "quiet_training",
    "single_items",
]
