"""plait models in Hugging Face transformers: `register()` once, then `AutoModelForCausalLM.from_pretrained(folder)`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plait.hub.cache import PlaitCache as PlaitCache
    from plait.hub.causal_lm import PlaitForCausalLM as PlaitForCausalLM
    from plait.hub.config import PlaitConfig as PlaitConfig

_LAZY = {
    "PlaitCache": "plait.hub.cache",
    "PlaitConfig": "plait.hub.config",
    "PlaitForCausalLM": "plait.hub.causal_lm",
}


def register() -> None:
    """Make transformers' AutoConfig and AutoModelForCausalLM know plait's folders. Calling it again changes nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from plait.hub.causal_lm import PlaitForCausalLM
    from plait.hub.config import PlaitConfig

    AutoConfig.register(PlaitConfig.model_type, PlaitConfig, exist_ok=True)
    AutoModelForCausalLM.register(PlaitConfig, PlaitForCausalLM, exist_ok=True)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'plait.hub' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
