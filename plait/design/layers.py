"""Layer configs: what each letter of a pattern may be. Numbers left out are derived from the model's `dim`.

Each config also says, without building anything, how many parameters the layer has, the matrix-multiply FLOPs it
spends on one token and the state it keeps. Tests hold these against the real modules.
"""

from typing import Self

from plait.design.layer import Layer as Layer
from plait.design.layer import default_head_dim
from plait.design.layer import told as told
from plait.design.recurrent import GRU, LSTM, RNN, SLSTM
from plait.design.spec import StateSpec, TensorSpec, wide
from plait.design.struct import Struct, positive


class RoPE(Struct, frozen=True, kw_only=True, tag=False):
    """Rotary positions (arXiv 2104.09864): the first `fraction` of each head turns with the position.

    `max_positions` is how far the model may be used: longer sequences are refused. None: no limit.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    max_positions: int | None = None

    def __post_init__(self) -> None:
        positive(self, "theta", "max_positions")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"RoPE.fraction must be in (0, 1], got {self.fraction}; for none at all write rope: null")

    def rotated(self, head_dim: int) -> int:
        """How many of a head's channels turn; even."""
        return int(head_dim * self.fraction) // 2 * 2


class Attention(Layer, frozen=True, kw_only=True, tag="attention"):
    """Softmax attention (arXiv 1706.03762). `kv_heads` 1 is MQA, below `heads` GQA (arXiv 2305.13245).

    window: a query sees itself and the window - 1 tokens before it. softcap: logits become c tanh(logits / c).
    output_gate: sigmoid gate from the input on the heads' output (Qwen3-Next). qk_norm: RMSNorm per head on q and k.
    """

    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    rope: RoPE | None = RoPE()
    qk_norm: bool = False
    output_gate: bool = False
    softcap: float | None = None
    bias: bool = False

    def __post_init__(self) -> None:
        positive(self, "heads", "kv_heads", "head_dim", "window", "softcap")
        if self.heads and self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"Attention: kv_heads {self.kv_heads} does not divide heads {self.heads}")

    def resolve(self, dim: int) -> Self:
        head_dim = self.head_dim or (dim // self.heads if self.heads else 64)
        if self.heads is None and dim % head_dim:
            raise ValueError(f"Attention: dim {dim} is not a multiple of head_dim {head_dim}, so heads must be given")
        if self.head_dim is None and self.heads and dim % self.heads:
            raise ValueError(f"Attention: heads {self.heads} do not divide dim {dim}; change heads or give head_dim")
        heads = self.heads or dim // head_dim
        if self.rope and head_dim % 2:
            raise ValueError(
                f"Attention: head_dim {head_dim} is odd, which RoPE cannot turn; use an even one or rope: null"
            )
        return self.replace(heads=heads, kv_heads=self.kv_heads or heads, head_dim=head_dim)

    def widths(self) -> tuple[int, int]:
        """Channels of all query heads and of all key heads."""
        assert self.heads and self.kv_heads and self.head_dim, "resolve(dim) first"
        return self.heads * self.head_dim, self.kv_heads * self.head_dim

    def _matrix(self, dim: int) -> int:
        query, key = self.widths()
        return dim * (query + 2 * key + query * self.output_gate) + query * dim

    def parameters(self, dim: int) -> int:
        query, key = self.widths()
        biases = (query + 2 * key + query * self.output_gate + dim) * self.bias
        return self._matrix(dim) + biases + 2 * (self.head_dim or 0) * self.qk_norm

    def flops(self, dim: int, context: int) -> int:
        query, _ = self.widths()
        return 2 * self._matrix(dim) + 4 * query * min(context, self.window or context)

    def state(self, dim: int, batch: int, length: int, dtype: str) -> StateSpec:
        keep = self.window - 1 if self.window else length
        shape = (batch, keep, self.kv_heads or 0, self.head_dim or 0)
        kind = "window" if self.window else "kv"
        return StateSpec(kind, (TensorSpec("k", shape, dtype), TensorSpec("v", shape, dtype)))


class Mamba2(Layer, frozen=True, kw_only=True, tag="mamba2"):
    """Mamba-2 (arXiv 2405.21060): short convolution, scalar-decay recurrence over a (head_dim, state_dim) state per head."""

    heads: int | None = None
    head_dim: int = 64
    state_dim: int = 128
    groups: int = 1
    expand: int = 2
    conv_width: int = 4
    conv_bias: bool = True

    def __post_init__(self) -> None:
        positive(self, "heads", "head_dim", "state_dim", "groups", "expand", "conv_width")
        if self.heads and self.heads % self.groups:
            raise ValueError(f"Mamba2: groups {self.groups} does not divide heads {self.heads}")

    def resolve(self, dim: int) -> Self:
        if self.heads is None and (self.expand * dim) % self.head_dim:
            raise ValueError(
                f"Mamba2: expand * dim = {self.expand * dim} is not a multiple of head_dim {self.head_dim}; give heads"
            )
        return self.replace(heads=self.heads or self.expand * dim // self.head_dim)

    def widths(self) -> tuple[int, int]:
        """Channels of x (and of the gate z), and of what the convolution sees: x, B and C."""
        assert self.heads, "resolve(dim) first"
        inner = self.heads * self.head_dim
        return inner, inner + 2 * self.groups * self.state_dim

    def parameters(self, dim: int) -> int:
        inner, conv = self.widths()
        heads = self.heads or 0
        return (
            dim * (inner + conv + heads) + conv * (self.conv_width + self.conv_bias) + 3 * heads + inner + inner * dim
        )

    def flops(self, dim: int, context: int) -> int:
        inner, conv = self.widths()
        matrices = dim * (inner + conv + (self.heads or 0)) + inner * dim
        return 2 * matrices + 2 * 2 * inner * self.state_dim  # write v k^T, read S q

    def state(self, dim: int, batch: int, length: int, dtype: str) -> StateSpec:
        _, conv = self.widths()
        return recurrent_spec(batch, self.heads or 0, self.head_dim, self.state_dim, self.conv_width, conv, dtype)


class GatedDeltaNet(Layer, frozen=True, kw_only=True, tag="gated_deltanet"):
    """Gated DeltaNet (arXiv 2412.06464) as laid out in Qwen3-Next; `heads` and `head_dim` are those of q and k."""

    heads: int | None = None
    head_dim: int | None = None
    value_heads: int | None = None
    value_head_dim: int | None = None
    conv_width: int = 4

    def __post_init__(self) -> None:
        positive(self, "heads", "head_dim", "value_heads", "value_head_dim", "conv_width")
        if self.heads and self.value_heads and self.value_heads % self.heads:
            raise ValueError(f"GatedDeltaNet: heads {self.heads} does not divide value_heads {self.value_heads}")

    def resolve(self, dim: int) -> Self:
        if self.head_dim is None and self.heads and dim % self.heads:
            raise ValueError(
                f"GatedDeltaNet: heads {self.heads} do not divide dim {dim}; change heads or give head_dim"
            )
        head_dim = self.head_dim or (dim // self.heads if self.heads else default_head_dim(dim, "GatedDeltaNet"))
        if self.heads is None and dim % head_dim:
            raise ValueError(f"GatedDeltaNet: dim {dim} is not a multiple of head_dim {head_dim}; give heads")
        heads = self.heads or dim // head_dim
        value_heads, value_head_dim = self.value_heads or heads, self.value_head_dim or head_dim
        return self.replace(heads=heads, head_dim=head_dim, value_heads=value_heads, value_head_dim=value_head_dim)

    def widths(self) -> tuple[int, int]:
        """Channels of all key heads and of all value heads."""
        assert self.heads and self.head_dim and self.value_heads and self.value_head_dim, "resolve(dim) first"
        return self.heads * self.head_dim, self.value_heads * self.value_head_dim

    def _matrix(self, dim: int) -> int:
        key, value = self.widths()
        return dim * (2 * key + 2 * value + 2 * (self.value_heads or 0)) + value * dim

    def parameters(self, dim: int) -> int:
        key, value = self.widths()
        small = (2 * key + value) * self.conv_width + 2 * (self.value_heads or 0) + (self.value_head_dim or 0)
        return self._matrix(dim) + small

    def flops(self, dim: int, context: int) -> int:
        _, value = self.widths()
        return 2 * self._matrix(dim) + 3 * 2 * value * (self.head_dim or 0)  # read S k, write, read S q

    def state(self, dim: int, batch: int, length: int, dtype: str) -> StateSpec:
        key, value = self.widths()
        return recurrent_spec(
            batch,
            self.value_heads or 0,
            self.value_head_dim or 0,
            self.head_dim or 0,
            self.conv_width,
            2 * key + value,
            dtype,
        )


def recurrent_spec(batch: int, heads: int, v: int, k: int, conv_width: int, conv: int, dtype: str) -> StateSpec:
    """A matrix state per head and the convolution's last inputs."""
    s = TensorSpec("s", (batch, heads, v, k), wide(dtype))
    return StateSpec("recurrent", (s, TensorSpec("conv", (batch, conv_width - 1, conv), dtype)))


class FeedForward(Layer, frozen=True, kw_only=True):
    """What the channel mixers share: `hidden` channels between two projections."""

    hidden: int | None = None
    bias: bool = False

    def __post_init__(self) -> None:
        positive(self, "hidden")

    def inputs(self) -> int:
        """Projections into the hidden channels."""
        return 1

    def default_hidden(self, dim: int) -> int:
        return 4 * dim

    def resolve(self, dim: int) -> Self:
        return self.replace(hidden=self.hidden or self.default_hidden(dim))

    def parameters(self, dim: int) -> int:
        hidden = self.hidden or 0
        return (self.inputs() + 1) * dim * hidden + (self.inputs() * hidden + dim) * self.bias

    def flops(self, dim: int, context: int) -> int:
        return 2 * (self.inputs() + 1) * dim * (self.hidden or 0)


class SwiGLU(FeedForward, frozen=True, kw_only=True, tag="swiglu"):
    """down(silu(gate x) * up x) (arXiv 2002.05202); `hidden` defaults to 8/3 dim rounded to 64."""

    def inputs(self) -> int:
        return 2

    def default_hidden(self, dim: int) -> int:
        return max(64, round(dim * 8 / 3 / 64) * 64)


class GELU(FeedForward, frozen=True, kw_only=True, tag="gelu"):
    """down(gelu(up x)) (arXiv 1606.08415, the tanh form GPT-2 uses); `hidden` defaults to 4 dim."""


class ReLU2(FeedForward, frozen=True, kw_only=True, tag="relu2"):
    """down(relu(up x)^2) (arXiv 2109.08668); `hidden` defaults to 4 dim."""


KINDS: dict[str, type[Layer]] = {
    "attention": Attention,
    "mamba2": Mamba2,
    "gated_deltanet": GatedDeltaNet,
    "rnn": RNN,
    "gru": GRU,
    "lstm": LSTM,
    "slstm": SLSTM,
    "swiglu": SwiGLU,
    "gelu": GELU,
    "relu2": ReLU2,
}

LETTERS: dict[str, Layer] = {
    "A": Attention(),
    "W": Attention(window=512),
    "M": Mamba2(),
    "D": GatedDeltaNet(),
    "G": GRU(),
    "H": LSTM(),
    "S": SLSTM(),
    "F": SwiGLU(),
}
