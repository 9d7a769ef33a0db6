"""Names of operator instances: the running module, the kind of operator, and which of its kind in the module it is.

A name does not depend on the data: it is the same in every step and process, for a few items of a batch as for all of
them, and in a forward that runs again in backward. Calls are counted from zero each time a module's forward begins; a
module that runs several times in a step has the same names each time.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save\.[^.]+)(?=\.|$)")


def plain_path(path: str) -> str:
    """A module's path in the base model as it was before it was adapted, whatever the adapter is called."""
    return _WRAPPERS.sub("", path)


def instance_name(path: str, kind: str, ordinal: int = 0) -> str:
    """`"encoder.layer.0:norm:1"`: the second norm that the module itself, or a layer of it without parts, calls."""
    return f"{path}:{kind}:{ordinal}"


def kind_of(name: str) -> str:
    """The kind in an instance's name."""
    return name.rsplit(":", 2)[1]


@dataclass
class Scope:
    """One run of a module's forward: how many operators of each kind it has called, and those of the present call."""

    path: str
    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    last: str = ""

    def name(self, kind: str) -> str:
        """The instance of this kind in the present call of a torch function."""
        found = self.names.get(kind)
        if found is None:
            ordinal = self.counts.get(kind, 0)
            self.counts[kind] = ordinal + 1
            found = self.names[kind] = instance_name(self.path, kind, ordinal)
        self.last = found
        return found


class OperatorCalls(threading.local):
    """The modules that run in one thread, the innermost last."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []

    def begin(self) -> None:
        """A torch function is called: kinds asked for from here on belong to new instances."""
        if self.scopes:
            self.scopes[-1].names.clear()
            self.scopes[-1].last = ""

    def name(self, kind: str) -> str | None:
        """Name of the operator of this kind in the present call; None outside of all modules."""
        return self.scopes[-1].name(kind) if self.scopes else None

    @property
    def current(self) -> str:
        """The instance whose bits were asked for last in the present call; `""` if none were."""
        return self.scopes[-1].last if self.scopes else ""

    def forget(self) -> None:
        """What the present call keeps has been counted."""
        if self.scopes:
            self.scopes[-1].last = ""

    def push(self, path: str) -> None:
        self.scopes.append(Scope(path))

    def pop(self) -> None:
        self.scopes.pop()

    @contextmanager
    def scope(self, path: str) -> Iterator[None]:
        """Inside, calls are those of a new run of the module at `path`."""
        self.push(path)
        try:
            yield
        finally:
            self.pop()
