"""From an attention model to a hybrid: which layers stay, what the others become, what they start from, and how they learn."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from plait.convert.conversion import Conversion as Conversion

if TYPE_CHECKING:
    from plait.convert.align import Alignment as Alignment
    from plait.convert.fit import fitted as fitted
    from plait.convert.plan import Cost as Cost
    from plait.convert.plan import Plan as Plan
    from plait.convert.plan import attention_places as attention_places
    from plait.convert.select import RULES as RULES
    from plait.convert.stages import Stages as Stages
    from plait.convert.transfer import student_of as student_of

_LAZY = {
    "Alignment": "align",
    "fitted": "fit",
    "Cost": "plan",
    "Plan": "plan",
    "attention_places": "plan",
    "RULES": "select",
    "Stages": "stages",
    "student_of": "transfer",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"plait.convert.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'plait.convert' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
