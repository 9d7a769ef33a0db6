"""Which operator takes the place of which torch function.

Importing the package fills `TABLE`. New operators add a handler, in one of these files, that enters itself.
"""

from . import activations, attention, choices, layers, norms, piecewise
from .context import TABLE, Context
from .functions import FORWARD_ONLY, GROWING, METADATA
from .lineage import record_lineage
from .saved import RULES

__all__ = [
    "FORWARD_ONLY",
    "GROWING",
    "METADATA",
    "RULES",
    "TABLE",
    "Context",
    "activations",
    "attention",
    "choices",
    "layers",
    "norms",
    "piecewise",
    "record_lineage",
]
