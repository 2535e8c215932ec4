"""The families of models that plait reads from and writes to transformers' folders: a `Family` for each `model_type`."""

from importlib import import_module

from plait.design.spelling import suggest
from plait.hub.families.family import Family as Family

# by the file that declares it
MODULES = {
    "lfm2": ("lfm2",),
    "recurrent_gemma": ("recurrent_gemma",),
    "xlstm": ("xlstm",),
    "minimax": ("minimax",),
    "falcon_h1": ("falcon_h1",),
    "zamba2": ("zamba2",),
    "llama": ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite"),
    "gemma": ("gemma2", "gemma3_text"),
    "olmo": ("olmo2", "olmo3"),
    "phi": ("phi3",),
    "moe": ("qwen3_moe", "qwen2_moe", "mixtral"),
    "deepseek": ("deepseek_v2", "deepseek_v3"),
    "bamba": ("bamba", "granitemoehybrid"),
    "jamba": ("jamba",),
    "nemotron_h": ("nemotron_h",),
    "mamba": ("mamba", "mamba2"),
    "fla": ("gla", "retnet", "delta_net", "gated_deltanet"),
    "fla_hgrn2": ("hgrn2",),
    "fla_rwkv7": ("rwkv7",),
    "kimi_linear": ("kimi_linear",),
    "olmo_hybrid": ("olmo_hybrid",),
    "qwen_hybrid": ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
}
# of several parts, of which plait reads the text model, by that one's family
OUTER = {"gemma3": "gemma3_text", "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
NAMES = tuple(name for names in MODULES.values() for name in names)
# flash-linear-attention's, of which transformers has no class; its kernels want a GPU
FLA = tuple(name for module, names in MODULES.items() if module.startswith("fla") for name in names)
TRANSFORMERS = tuple(name for name in NAMES if name not in FLA)


def family(name: str) -> Family:
    """Raises ValueError naming the nearest family there is."""
    for module, names in MODULES.items():
        if name in names:
            declared = import_module(f"plait.hub.families.{module}").FAMILIES
            return next(found for found in declared if found.model_type == name)
    raise ValueError(f"no family {name!r}; {suggest(name, NAMES)}")
