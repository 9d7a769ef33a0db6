"""Makes PEFT know the method "S2A".

PEFT's `PeftType` is a closed enum and its registration refuses names outside it, so a member is added here.
"""

from __future__ import annotations

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method

TYPE_NAME = "S2A"
PREFIX = "s2a_"
PACKAGE = __name__.partition(".")[0]


def add_peft_type() -> PeftType:
    """Adds the member `S2A` to `PeftType`, or returns it where it is there."""
    known = PeftType.__members__.get(TYPE_NAME)
    if known is not None:
        return known
    member = str.__new__(PeftType, TYPE_NAME)
    member._name_ = TYPE_NAME
    member._value_ = TYPE_NAME
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    PeftType._member_names_.append(TYPE_NAME)
    PeftType._member_map_[TYPE_NAME] = member
    PeftType._value2member_map_[TYPE_NAME] = member
    hashable_values = getattr(PeftType, "_hashable_values_", None)  # Python 3.12 and later
    if hashable_values is not None:
        hashable_values.append(TYPE_NAME)
    type.__setattr__(PeftType, TYPE_NAME, member)
    return member


def register(config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Registers the method with PEFT; a second call does nothing.

    Raises:
        RuntimeError: if another package has registered a method of this name.
    """
    member = add_peft_type()
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if registered is config_cls:
        return
    if registered is not None:
        raise RuntimeError(
            f"PEFT already has a method {TYPE_NAME!r}, registered by {registered.__module__}. Both cannot be used in "
            f"one process: do not import {registered.__module__.partition('.')[0]} together with {PACKAGE}."
        )
    register_peft_method(name=TYPE_NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
