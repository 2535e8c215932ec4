"""Layer configs: what each letter of a pattern may be. Numbers left out are derived from the model's `dim`.

A file per family, under the same name as its module in `plait.layers`. Each config declares what it learns and the state it
keeps, so that both can be counted without building anything; tests hold the counts against the real modules.
"""

from plait.design.layers.attention import Attention as Attention
from plait.design.layers.deltanet import DeltaNet as DeltaNet
from plait.design.layers.elementwise import HGRN as HGRN
from plait.design.layers.elementwise import MinGRU as MinGRU
from plait.design.layers.elementwise import MinLSTM as MinLSTM
from plait.design.layers.feed_forward import GEGLU as GEGLU
from plait.design.layers.feed_forward import GELU as GELU
from plait.design.layers.feed_forward import FeedForward as FeedForward
from plait.design.layers.feed_forward import ReLU2 as ReLU2
from plait.design.layers.feed_forward import SwiGLU as SwiGLU
from plait.design.layers.gated_conv import GatedConv as GatedConv
from plait.design.layers.gated_deltanet import GatedDeltaNet as GatedDeltaNet
from plait.design.layers.gla import GLA as GLA
from plait.design.layers.hgrn2 import HGRN2 as HGRN2
from plait.design.layers.kimi_delta import KimiDeltaAttention as KimiDeltaAttention
from plait.design.layers.latent_attention import LatentAttention as LatentAttention
from plait.design.layers.layer import Layer as Layer
from plait.design.layers.layer import Mixer as Mixer
from plait.design.layers.linear import Linear as Linear
from plait.design.layers.mamba import Mamba as Mamba
from plait.design.layers.mamba2 import Mamba2 as Mamba2
from plait.design.layers.mlstm import MLSTM as MLSTM
from plait.design.layers.moe import MixtureOfExperts as MixtureOfExperts
from plait.design.layers.recurrent import GRU as GRU
from plait.design.layers.recurrent import LSTM as LSTM
from plait.design.layers.recurrent import RNN as RNN
from plait.design.layers.recurrent import SLSTM as SLSTM
from plait.design.layers.rg_lru import RGLRU as RGLRU
from plait.design.layers.rope import RoPE as RoPE
from plait.design.layers.rope import Temperature as Temperature
from plait.design.layers.rwkv7 import RWKV7 as RWKV7
from plait.design.layers.rwkv7 import RWKV7FeedForward as RWKV7FeedForward
from plait.design.layers.scalar_decay import LightningAttention as LightningAttention
from plait.design.layers.scalar_decay import RetNet as RetNet
from plait.design.layers.scalar_decay import ScalarDecay as ScalarDecay
from plait.design.layers.scalar_decay import SimpleGLA as SimpleGLA

KINDS: dict[str, type[Layer]] = {
    "attention": Attention,
    "latent_attention": LatentAttention,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "gated_deltanet": GatedDeltaNet,
    "mlstm": MLSTM,
    "retnet": RetNet,
    "lightning_attention": LightningAttention,
    "simple_gla": SimpleGLA,
    "deltanet": DeltaNet,
    "gla": GLA,
    "hgrn2": HGRN2,
    "kimi_delta_attention": KimiDeltaAttention,
    "rwkv7": RWKV7,
    "rwkv7_feed_forward": RWKV7FeedForward,
    "gated_conv": GatedConv,
    "rnn": RNN,
    "gru": GRU,
    "lstm": LSTM,
    "slstm": SLSTM,
    "rg_lru": RGLRU,
    "hgrn": HGRN,
    "min_gru": MinGRU,
    "min_lstm": MinLSTM,
    "swiglu": SwiGLU,
    "geglu": GEGLU,
    "gelu": GELU,
    "relu2": ReLU2,
    "linear": Linear,
    "moe": MixtureOfExperts,
}

LETTERS: dict[str, Layer] = {
    "A": Attention(),
    "W": Attention(window=512),
    "L": LatentAttention(),
    "M": Mamba2(),
    "D": GatedDeltaNet(),
    "X": MLSTM(),
    "Rn": RetNet(),
    "Li": LightningAttention(),
    "Sg": SimpleGLA(),
    "Dn": DeltaNet(),
    "Gl": GLA(),
    "Ht": HGRN2(),
    "K": KimiDeltaAttention(),
    "Rw": RWKV7(),
    "Rf": RWKV7FeedForward(),
    "C": GatedConv(),
    "G": GRU(),
    "H": LSTM(),
    "S": SLSTM(),
    "Ma": Mamba(),
    "R": RGLRU(),
    "Hg": HGRN(),
    "Mg": MinGRU(),
    "Ml": MinLSTM(),
    "F": SwiGLU(),
    "P": Linear(),
    "E": MixtureOfExperts(),
}
