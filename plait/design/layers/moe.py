"""Mixture of experts: channel mixers of which a router chooses a few for every token."""

from typing import Literal, Self

from plait.design.layers.layer import Layer
from plait.design.struct import DERIVED, between, positive
from plait.design.weights import Constant, Normal, Weight, Weights, projection


class MixtureOfExperts(Layer, frozen=True, kw_only=True, tag="moe"):
    """Channel mixers of `hidden` channels side by side, `top_k` of them for each token (Switch, arXiv 2101.03961; Mixtral,
    arXiv 2401.04088); none drops a token. `hidden` defaults to that of a SwiGLU over top_k, rounded to 64.

    activation: each is a SwiGLU, or "relu2": down(relu(up x)^2), `hidden` defaulting to 4 dim over top_k (Nemotron-H).
    latent_dim: they read and write so many channels, between two projections that all share (arXiv 2601.18089).
    router: what scores are made of logits by. renormalize: the chosen scores sum to one, times `scale`.
    groups, top_groups: experts are chosen in the groups whose `group_best` best scores sum to most: two (DeepSeek-V3, arXiv
    2412.19437), one (DeepSeek-V2, arXiv 2405.04434).
    shared_hidden: channels of an expert that every token passes, `shared_gate`: times a sigmoid of the token (Qwen2-MoE).
    balance_loss: weight of the loss that is 1 where experts are loaded evenly (Switch, equation 4). z_loss: of the squared
    log-sum of the router's exponentials (ST-MoE, arXiv 2202.08906, equation 5).
    bias_rate: a bias per expert, which chooses but does not weigh, moves so far in each training step towards an even load
    (DeepSeek-V3, section 2.1.2); 0: it is there and stays. None: there is none.
    """

    experts: int = 8
    top_k: int = 2
    hidden: int = DERIVED
    activation: Literal["swiglu", "relu2"] = "swiglu"
    latent_dim: int | None = None
    router: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_best: int = 2
    shared_hidden: int | None = None
    shared_gate: bool = False
    balance_loss: float = 0.01
    z_loss: float = 0.001
    bias_rate: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "experts", "top_k", "hidden", "scale", "groups", "top_groups", "shared_hidden", "latent_dim")
        between(self, 0, 1e3, "balance_loss", "z_loss", "bias_rate")
        name, each = "MixtureOfExperts", self.experts // self.groups
        if self.experts % self.groups:
            raise ValueError(f"{name}.groups {self.groups} does not divide experts {self.experts}")
        if self.groups > 1 and each < self.group_best:
            left, most = "one expert" if each == 1 else f"{each} experts", self.experts // self.group_best
            raise ValueError(f"{name}.groups {self.groups} leaves {left} in each; give at most {most}")
        if self.top_groups > self.groups:
            raise ValueError(f"{name}.top_groups {self.top_groups} is more than groups {self.groups}")
        if self.top_k > self.top_groups * each:
            where = "experts" if self.groups == 1 else f"experts in {self.top_groups} of {self.groups} groups,"
            raise ValueError(f"{name}.top_k {self.top_k} is more than the {where} {self.top_groups * each}")
        if self.shared_gate and self.shared_hidden is None:
            raise ValueError(f"{name}.shared_gate is of a shared expert; give shared_hidden")

    def resolve(self, dim: int) -> Self:
        times = 8 / 3 if self.gated else 4
        return self.replace(hidden=self.hidden or max(64, round(dim * times / self.top_k / 64) * 64))

    @property
    def gated(self) -> bool:
        """Whether an expert's first matrix has rows of a gate, too."""
        return self.activation == "swiglu"

    def rows(self, hidden: int) -> dict[str, int]:
        """Of the first matrix of an expert that wide."""
        return {"gate": hidden, "up": hidden} if self.gated else {"up": hidden}

    def weights(self, dim: int, reads: int | None = None) -> Weights:
        n, h, reads, used = self.experts, self.hidden, reads or dim, self.top_k / self.experts
        rows, latent = self.rows(h), self.latent_dim
        inside, out = latent or reads, latent or dim
        learned = [Weight("router", (n, reads), "blocks", Normal(reads**-0.5))]
        if self.bias_rate is not None:
            learned.append(Weight("router_bias", (n,), "balance", Constant(0.0)))
        learned += [
            Weight(
                "experts_up",
                (n, sum(rows.values()), inside),
                "experts",
                Normal(inside**-0.5),
                (*rows.items(),),
                used=used,
            ),
            Weight("experts_down", (n, out, h), "experts", Normal(h**-0.5), writes=latent is None, used=used),
        ]
        if latent:
            learned += projection("latent_in_proj", latent, reads)
            learned += projection("latent_out_proj", dim, latent, writes=True)
        if shared := self.shared_hidden:
            learned += projection("shared_up_proj", self.rows(shared), reads)
            learned += projection("shared_down_proj", dim, shared, writes=True)
            if self.shared_gate:
                learned.append(Weight("shared_gate", (1, reads), "blocks", Normal(reads**-0.5)))
        return tuple(learned)
