"""Which experts a token goes to, and how much each counts: top-k of softmax (Switch, arXiv 2101.03961) or sigmoid scores
(DeepSeek-V3, arXiv 2412.19437, equations 13 to 16)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

TINY = 1e-20  # added to the sum of the chosen scores, which sigmoids of -100 would leave at 0


def route(
    scores: Float[Tensor, "*n e"],
    top_k: int,
    *,
    bias: Float[Tensor, " e"] | None = None,
    groups: int = 1,
    top_groups: int = 1,
    group_best: int = 2,
    renormalize: bool = True,
    scale: float = 1.0,
) -> tuple[Int[Tensor, "*n k"], Float[Tensor, "*n k"]]:
    """The experts chosen, best first, and their weights. The bias has a say in who is chosen, none in the weights."""
    ranked = scores.detach() if bias is None else scores.detach() + bias
    if top_groups < groups:
        ranked = _within_best(ranked, groups, top_groups, group_best)
    index = ranked.topk(top_k, -1).indices
    weights = scores.gather(-1, index)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + TINY)
    return index, weights if scale == 1 else weights * scale


def _within_best(ranked: Float[Tensor, "*n e"], groups: int, top_groups: int, each: int) -> Float[Tensor, "*n e"]:
    """-inf outside of the groups whose so many best experts sum to most."""
    grouped = ranked.unflatten(-1, (groups, -1))
    best = grouped.topk(each, -1).values.sum(-1).topk(top_groups, -1).indices
    kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
    return grouped.masked_fill(~kept[..., None], -torch.inf).flatten(-2)


def balance(probabilities: Float[Tensor, "*n e"], index: Int[Tensor, "*n k"]) -> Float[Tensor, ""]:
    """e sum_i f_i P_i (Switch, equation 4): f_i is the share of choices that are expert i, P_i its mean probability. 1 where
    both are even; only the second has a gradient."""
    experts = probabilities.shape[-1]
    shares = load(index, experts).to(probabilities.dtype) / index.numel()
    return experts * torch.dot(shares, probabilities.flatten(0, -2).mean(0))


def load(index: Int[Tensor, "*n k"], experts: int) -> Int[Tensor, " e"]:
    """How many tokens chose each expert."""
    chosen = index.flatten()
    return chosen.new_zeros(experts).scatter_add(0, chosen, torch.ones_like(chosen))
