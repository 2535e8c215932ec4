"""plait models in Hugging Face transformers: after `import plait.hub`, `AutoModelForCausalLM.from_pretrained(folder)`."""

from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from plait.design.declared import lora_targets as lora_targets
from plait.hub.cache import PlaitCache as PlaitCache
from plait.hub.causal_lm import PlaitForCausalLM as PlaitForCausalLM
from plait.hub.config import PlaitConfig as PlaitConfig


def register() -> None:
    """Enter plait's folders in transformers' tables; importing this module has done it. Again changes nothing."""
    AutoConfig.register(PlaitConfig.model_type, PlaitConfig, exist_ok=True)
    AutoModelForCausalLM.register(PlaitConfig, PlaitForCausalLM, exist_ok=True)
    # what Trainer's label smoothing, pipelines and lm-eval look up to know that labels are to be shifted
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[PlaitConfig.model_type] = PlaitForCausalLM.__name__
    OptimizedModule._get_name = _name_of_compiled  # that name is asked of what torch.compile wraps around a model too


def _name_of_compiled(self: OptimizedModule) -> str:
    """As torch has it, but for a plait model, with adapters or without, whose own name transformers has to find."""
    inner: Any = self._orig_mod
    if hasattr(inner, "get_base_model"):  # peft's
        inner = inner.get_base_model()
    return nn.Module._get_name(inner if isinstance(inner, PlaitForCausalLM) else self)


register()
