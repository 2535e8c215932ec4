"""The two ends of a model: what comes in becomes vectors (front), and vectors become what is asked for (head)."""

from plait.design.struct import Struct, positive
from plait.design.weights import Constant, Normal, Weight, Weights, projection


class Front(Struct, frozen=True, kw_only=True):
    """What all fronts share. scale: a factor on the embeddings. norm: they are normed before the first slot.

    positions: a learned vector for each of so many positions is added; longer sequences are refused.
    meta: so many learned vectors stand before every sequence (Hymba, arXiv 2411.13676).
    """

    scale: float = 1.0
    norm: bool = False
    positions: int | None = None
    meta: int = 0

    def __post_init__(self) -> None:
        positive(self, "scale", "positions")
        if self.meta < 0:
            raise ValueError(f"{type(self).__name__}.meta must not be below 0, got {self.meta}")

    def embedding(self, dim: int, vocab: int) -> Weights:
        raise NotImplementedError

    def weights(self, dim: int, vocab: int) -> Weights:
        """All but the norm's."""
        start = Normal(dim**-0.5)
        tables = {"positions.weight": self.positions, "meta": self.meta}
        learned = tuple(Weight(name, (rows, dim), "embedding", start) for name, rows in tables.items() if rows)
        return self.embedding(dim, vocab) + learned


class Tokens(Front, frozen=True, kw_only=True, tag="tokens"):
    """Token ids (b, t), each a row of a learned table."""

    def embedding(self, dim: int, vocab: int) -> Weights:
        return (Weight("embed.weight", (vocab, dim), "embedding", Normal(dim**-0.5)),)


class Vectors(Front, frozen=True, kw_only=True, tag="vectors"):
    """Frames, patches or other vectors (b, t, features), projected to the model's width."""

    features: int
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "features")

    def embedding(self, dim: int, vocab: int) -> Weights:
        return projection("embed", dim, self.features, bias=self.bias)


class Head(Struct, frozen=True, kw_only=True):
    """What all heads share: y = W norm(x) (+ b), times `scale`, then soft-capped to c tanh(y / c) where `softcap` is set."""

    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        positive(self, "scale", "softcap")

    def rows(self, vocab: int) -> int:
        raise NotImplementedError

    def weights(self, dim: int, vocab: int, tied: bool) -> Weights:
        """All but the norm's."""
        if tied:
            bias = Weight("lm_head_bias", (self.rows(vocab),), "bias", Constant(0.0))
            return (bias,) if self.bias else ()
        return projection("lm_head", self.rows(vocab), dim, bias=self.bias)


class Logits(Head, frozen=True, kw_only=True, tag="logits"):
    """A score for each id of the vocabulary (or each class). Its matrix is the embeddings' where `tie_embeddings` says so."""

    def rows(self, vocab: int) -> int:
        return vocab


class Regression(Head, frozen=True, kw_only=True, tag="regression"):
    """`outputs` numbers for each position."""

    outputs: int
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "outputs")

    def rows(self, vocab: int) -> int:
        return self.outputs


FRONT_KINDS: dict[str, type[Front]] = {"tokens": Tokens, "vectors": Vectors}
HEAD_KINDS: dict[str, type[Head]] = {"logits": Logits, "regression": Regression}
