"""plait: hybrid recurrent-attention sequence models. `import plait` loads neither torch nor transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from plait.design import GEGLU as GEGLU
from plait.design import GELU as GELU
from plait.design import GLA as GLA
from plait.design import GRU as GRU
from plait.design import HGRN as HGRN
from plait.design import HGRN2 as HGRN2
from plait.design import LSTM as LSTM
from plait.design import MLSTM as MLSTM
from plait.design import PRESETS as PRESETS
from plait.design import RGLRU as RGLRU
from plait.design import RNN as RNN
from plait.design import RWKV7 as RWKV7
from plait.design import SLSTM as SLSTM
from plait.design import Attention as Attention
from plait.design import Average as Average
from plait.design import DeltaNet as DeltaNet
from plait.design import Gated as Gated
from plait.design import GatedConv as GatedConv
from plait.design import GatedDeltaNet as GatedDeltaNet
from plait.design import KimiDeltaAttention as KimiDeltaAttention
from plait.design import LatentAttention as LatentAttention
from plait.design import Layer as Layer
from plait.design import LayerNorm as LayerNorm
from plait.design import LightningAttention as LightningAttention
from plait.design import Linear as Linear
from plait.design import Logits as Logits
from plait.design import Mamba as Mamba
from plait.design import Mamba2 as Mamba2
from plait.design import MergeAttention as MergeAttention
from plait.design import MinGRU as MinGRU
from plait.design import MinLSTM as MinLSTM
from plait.design import Mixer as Mixer
from plait.design import MixtureOfExperts as MixtureOfExperts
from plait.design import ModelConfig as ModelConfig
from plait.design import PatternError as PatternError
from plait.design import Projection as Projection
from plait.design import Regression as Regression
from plait.design import ReLU2 as ReLU2
from plait.design import RetNet as RetNet
from plait.design import RMSNorm as RMSNorm
from plait.design import RoPE as RoPE
from plait.design import RWKV7FeedForward as RWKV7FeedForward
from plait.design import SimpleGLA as SimpleGLA
from plait.design import Sum as Sum
from plait.design import SwiGLU as SwiGLU
from plait.design import Temperature as Temperature
from plait.design import Tokens as Tokens
from plait.design import Vectors as Vectors
from plait.design import Wrap as Wrap
from plait.design import load_design as load_design
from plait.design import parse as parse
from plait.design import render as render

if TYPE_CHECKING:
    from plait.data import load_tokenizer as load_tokenizer
    from plait.engine import generate as generate
    from plait.hub.checkpoint import export as export
    from plait.layers import Channels as Channels
    from plait.layers.declared import LayerModule as LayerModule
    from plait.layers.declared import MixerModule as MixerModule
    from plait.layers.register import register as register
    from plait.model import LanguageModel as LanguageModel
    from plait.model import build as build
    from plait.model import checking as checking
    from plait.model import listening as listening
    from plait.model import save as save
    from plait.model import swap as swap
    from plait.opening import load as load
    from plait.ops.shooting import Cell as Cell
    from plait.state import ModelState as ModelState
    from plait.state import StaleState as StaleState

__version__ = "0.1.0"

_LAZY = {
    "Cell": "plait.ops.shooting",
    "Channels": "plait.layers",
    "register": "plait.layers.register",
    "LanguageModel": "plait.model",
    "build": "plait.model",
    "export": "plait.hub.checkpoint",
    "checking": "plait.model",
    "listening": "plait.model",
    "load": "plait.opening",
    "swap": "plait.model",
    "LayerModule": "plait.layers.declared",
    "MixerModule": "plait.layers.declared",
    "save": "plait.model",
    "ModelState": "plait.state",
    "StaleState": "plait.state",
    "generate": "plait.engine",
    "load_tokenizer": "plait.data",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'plait' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
