"""Which operator takes the place of which torch function.

Importing the package fills `TABLE`. New operators add a handler, in one of these files, that enters itself.
"""

from . import activations, attention, layers, norms
from .context import TABLE, Context
from .functions import GROWING, MULTIPLYING

__all__ = ["GROWING", "MULTIPLYING", "TABLE", "Context", "activations", "attention", "layers", "norms"]
