"""Softmax attention."""

from dataclasses import replace
from typing import Literal, Self

from plait.design.layers.layer import Mixer, head_sizes
from plait.design.layers.rope import RoPE, Temperature
from plait.design.spec import Leaf, Memory
from plait.design.spelling import suggest
from plait.design.struct import DERIVED, MAX_SIZE, at_most, positive
from plait.design.weights import Bias, Constant, Weight, Weights, norm, projection


class Attention(Mixer, frozen=True, kw_only=True, tag="attention"):
    """Softmax attention (arXiv 1706.03762). `kv_heads` 1 is MQA, below `heads` GQA (arXiv 2305.13245).

    window: a query sees itself and the window - 1 tokens before it, and the first `prefix` tokens of all (arXiv 2309.17453), a
    model's meta tokens included. sinks: a learned logit per head that takes its part of the softmax and has no value (gpt-oss).
    softcap: logits become c tanh(logits / c).
    output_gate: sigmoid gate from the input on the heads' output (Qwen3-Next).
    qk_norm: RMSNorm per head on q and k, or "wide": on all heads together (OLMo-2, arXiv 2501.00656).
    bias: true for all projections, or the names of those that have one, of q, k, v, gate and o: [q, k, v] is Qwen2.
    scale: on q . k; null: 1 / sqrt(head_dim). temperature: what queries are multiplied by the further on they stand (Llama 4).
    """

    heads: int = DERIVED
    kv_heads: int = DERIVED
    head_dim: int = DERIVED
    window: int | None = None
    prefix: int = 0
    sinks: bool = False
    rope: RoPE | None = RoPE()
    qk_norm: bool | Literal["wide"] = False
    output_gate: bool = False
    softcap: float | None = None
    scale: float | None = None
    temperature: Temperature | None = None
    bias: Bias = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "heads", "kv_heads", "head_dim", "window", "softcap", "scale")
        if self.prefix < 0 or (self.prefix and not self.window):
            raise ValueError(
                f"Attention.prefix: the first tokens that a window sees beside the last ones, 0 or more; got {self.prefix}"
                + ("" if self.window else " and no window: without one all are seen")
            )
        at_most(self, "prefix", MAX_SIZE)
        if self.heads and self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"Attention: kv_heads {self.kv_heads} does not divide heads {self.heads}")
        known = ("q", "k", "v", *(["gate"] if self.output_gate else []), "o")
        for part in self.bias if isinstance(self.bias, tuple) else ():
            if part not in known:
                raise ValueError(f"Attention.bias: there is no projection {part!r}; {suggest(part, known)}")

    def resolve(self, dim: int) -> Self:
        heads, head_dim = head_sizes("Attention", dim, self.heads, self.head_dim, default=64)
        if self.rope and head_dim % 2:
            raise ValueError(
                f"Attention: head_dim {head_dim} is odd, which RoPE cannot turn; use an even one or rope: null"
            )
        if self.rope:
            self.rope.check("Attention", head_dim)
        return self.replace(heads=heads, kv_heads=self.kv_heads or heads, head_dim=head_dim)

    def inner(self) -> int:
        return self.heads * self.head_dim

    def rows(self) -> dict[str, int]:
        """Channels of q, k, v and the gate, in the order of the fused projection."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {"q": query, "k": key, "v": key} | ({"gate": query} if self.output_gate else {})

    def weights(self, dim: int, reads: int | None = None) -> Weights:
        rows, o = self.rows(), self.bias if isinstance(self.bias, bool) else "o" in self.bias
        query, key = (rows["q"], rows["k"]) if self.qk_norm == "wide" else (self.head_dim, self.head_dim)
        norms = (norm("q_norm", query), norm("k_norm", key)) if self.qk_norm else ()
        residual = (
            (Weight("value_mix", (2,), "vector", Constant(0.5)),) if self.wrap and self.wrap.value_residual else ()
        )
        return (
            *projection("qkv_proj", rows, reads or dim, bias=self.bias),
            *self.output("o_proj", dim, bias=o),
            *norms,
            *((Weight("sinks", (self.heads,), "vector", Constant(0.0)),) if self.sinks else ()),
            *residual,
        )

    def mixing(self, dim: int, context: int) -> int:
        return 4 * self.heads * self.head_dim * min(context, self.prefix + (self.window or context))

    def state(self, dim: int, dtype: str) -> Memory:
        kind, keep = ("window", self.window - 1) if self.window else ("kv", "all")
        shape, ring = (self.kv_heads, self.head_dim), self.window is not None
        leaf = Leaf("k", shape, dtype, keep, ring=ring, prefix=self.prefix)
        return Memory(kind, (leaf, replace(leaf, name="v")))
