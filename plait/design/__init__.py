"""Architecture as data: patterns, layer configs, presets, counting. No tensors here."""

from plait.design.layers import GELU as GELU
from plait.design.layers import GRU as GRU
from plait.design.layers import LSTM as LSTM
from plait.design.layers import RNN as RNN
from plait.design.layers import SLSTM as SLSTM
from plait.design.layers import Attention as Attention
from plait.design.layers import GatedDeltaNet as GatedDeltaNet
from plait.design.layers import Mamba2 as Mamba2
from plait.design.layers import ReLU2 as ReLU2
from plait.design.layers import RoPE as RoPE
from plait.design.layers import SwiGLU as SwiGLU
from plait.design.load import load_design as load_design
from plait.design.merges import Average as Average
from plait.design.merges import Gated as Gated
from plait.design.merges import MergeAttention as MergeAttention
from plait.design.merges import Projection as Projection
from plait.design.merges import Sum as Sum
from plait.design.model import ModelConfig as ModelConfig
from plait.design.model import RMSNorm as RMSNorm
from plait.design.pattern import PatternError as PatternError
from plait.design.pattern import parse as parse
from plait.design.pattern import render as render
from plait.design.presets import PRESETS as PRESETS
