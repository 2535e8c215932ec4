"""Mixture of experts."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from plait.design.layers import MixtureOfExperts
from plait.design.model import ModelConfig
from plait.layers.context import Context
from plait.layers.declared import LayerModule
from plait.ops.kernels import Call, full_precision, wide
from plait.ops.moe import aligned, experts, route
from plait.ops.moe.activation import activated
from plait.ops.moe.routing import balance, load
from plait.state import Nothing

LOAD = "load"  # tokens of each expert in a call; summed over parts of a batch and ranks


class MixtureOfExpertsLayer(LayerModule):
    """A router, whose scores are float32 at least; experts of which it chooses; and one that all tokens pass."""

    config: MixtureOfExperts
    router: nn.Parameter
    router_bias: nn.Parameter | None
    experts_up: nn.Parameter
    experts_down: nn.Parameter
    latent_in_proj: nn.Linear
    latent_out_proj: nn.Linear
    shared_up_proj: nn.Linear
    shared_down_proj: nn.Linear
    shared_gate: nn.Parameter

    @classmethod
    def ops(cls, config: MixtureOfExperts, call: Call) -> list[tuple[str, int]]:
        return [("moe", aligned(config.hidden, config.latent_dim or 0))]

    def assemble(self, design: ModelConfig) -> None:
        if self.config.bias_rate is None:
            self.register_parameter("router_bias", None)

    def forward(
        self, x: Float[Tensor, "b t d"], context: Context, state: Nothing | None
    ) -> tuple[Float[Tensor, "b t d"], Nothing | None]:
        c = self.config
        with full_precision(x.device):
            logits = F.linear(wide(x), wide(self.router))
            scores = logits.softmax(-1) if c.router == "softmax" else logits.sigmoid()
            index, weights = route(
                scores,
                c.top_k,
                bias=self.router_bias,
                groups=c.groups,
                top_groups=c.top_groups,
                group_best=c.group_best,
                renormalize=c.renormalize,
                scale=c.scale,
            )
            if context.out is not None:
                self.tell(context, logits, scores, index)
        inside = x if c.latent_dim is None else self.latent_in_proj(x)
        y = experts(inside, self.experts_up, self.experts_down, index, weights, c.gated)
        if c.latent_dim is not None:
            y = self.latent_out_proj(y)
        return (y if c.shared_hidden is None else y + self.shared(x)), state

    def tell(self, context: Context, logits: Tensor, scores: Tensor, index: Tensor) -> None:
        """The losses that keep a router even and its logits small, and how many tokens each expert has."""
        c = self.config
        context.stat(LOAD, load(index, c.experts), "sum")
        if c.balance_loss and torch.is_grad_enabled():
            context.loss("balance", c.balance_loss * balance(scores / scores.sum(-1, keepdim=True), index))
        if c.z_loss and torch.is_grad_enabled():
            context.loss("router_z", c.z_loss * logits.logsumexp(-1).square().mean())

    def shared(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        y = self.shared_down_proj(activated(self.shared_up_proj(x), self.config.gated))
        return y * torch.sigmoid(F.linear(x, self.shared_gate)) if self.config.shared_gate else y

    @torch.no_grad()
    def rebalance(self, tokens: Float[Tensor, " e"], keep: Tensor) -> None:
        """Move the biases of experts with fewer tokens than the mean up, the others down; not at all where `keep` is 0."""
        if self.router_bias is not None and self.config.bias_rate:
            step = self.config.bias_rate * keep * torch.sign(tokens.mean() - tokens)
            self.router_bias.add_(step.to(self.router_bias))
