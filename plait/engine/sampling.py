"""From logits to tokens."""

import math
import random
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from plait.design.struct import Struct


class Sampling(Struct, frozen=True, kw_only=True, tag=False):
    """How the next token is chosen: at temperature 0 the likeliest, above 0 a sample of softmax(logits / temperature).

    What may be sampled is narrowed in this order: `top_k` keeps the k likeliest tokens; `top_p` the fewest tokens whose
    probabilities sum to at least p; `min_p` those at least min_p times as likely as the likeliest. Before all that,
    `repetition_penalty` (arXiv 1909.05858) divides the positive and multiplies the negative logits of tokens that the
    prompt or the continuation already holds.

    Row r of a batch draws from `seed` + r, so its text is what it would be alone with that seed, whoever its mates are.
    Without a seed, torch's global random state gives one.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _in_range("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or above")
        _in_range("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0 (1 is none)")
        if self.top_k is not None:
            _in_range("top_k", self.top_k, self.top_k >= 1, "1 or above")
        if self.top_p is not None:
            _in_range("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        if self.min_p is not None:
            _in_range("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1")
        for name in ("top_k", "top_p", "min_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)} does nothing at temperature 0; give temperature=1.0 too"
                )


def _in_range(name: str, value: float, fine: bool, expected: str) -> None:
    if not fine or value in (math.inf, -math.inf):  # a comparison with NaN was false already
        raise ValueError(f"{name} must be {expected}, got {value}")


class Sampler:
    """Chooses tokens for the rows of one batch; remembers each row's random numbers and the tokens it has held."""

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]], vocab: int, device: torch.device):
        self.sampling = sampling
        self._draws: list[random.Random] = []
        self._held: Bool[Tensor, "b v"] | None = None
        if sampling.temperature > 0:
            seed = int(torch.randint(2**62, (), device="cpu")) if sampling.seed is None else sampling.seed
            self._draws = [_numbers(seed + row) for row in range(len(prompts))]
        if sampling.repetition_penalty != 1:
            self._held = torch.zeros(len(prompts), vocab, dtype=torch.bool, device=device)
            for row, prompt in enumerate(prompts):
                self._held[row, torch.tensor(prompt, device=device)] = True

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all rows but these."""
        if self._draws:
            self._draws = [self._draws[row] for row in rows]
        if self._held is not None:
            self._held = self._held[torch.tensor(rows, device=self._held.device)]

    def choose(self, logits: Float[Tensor, "b v"]) -> Int[Tensor, " b"]:
        """The next token of each row."""
        if self._held is not None:
            penalty = _within(self.sampling.repetition_penalty, logits.dtype)
            told = torch.where(logits < 0, logits * penalty, logits / penalty)
            limits = torch.finfo(logits.dtype)  # or with all tokens at infinity there were nothing to choose by
            logits = torch.where(self._held, told.clamp(limits.min, limits.max), logits)
        if self._draws:
            draws = torch.tensor([[row.random()] for row in self._draws], dtype=torch.float64, device=logits.device)
            tokens = draw(narrow(logits, self.sampling), draws)
        else:
            tokens = logits.max(-1).indices  # argmax, which takes three times as long on a CPU
        if self._held is not None:
            self._held.scatter_(1, tokens[:, None], True)
        return tokens


def _numbers(seed: int) -> random.Random:
    """Python's generator takes -1 for 1; text it takes as it is."""
    return random.Random(seed if seed >= 0 else str(seed))


def _within(factor: float, dtype: torch.dtype) -> float:
    """The nearest that is neither 0 nor infinite in `dtype`."""
    return min(max(factor, torch.finfo(dtype).tiny), torch.finfo(dtype).max)


def narrow(logits: Float[Tensor, "b v"], sampling: Sampling) -> Float[Tensor, "b v"]:
    """Logits over the temperature, the largest 0, -inf for tokens that top-k, top-p or min-p rule out; float32 or wider."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits - logits.amax(-1, keepdim=True)  # or over a small temperature the likeliest would be infinite
    logits = logits / _within(sampling.temperature, logits.dtype)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = logits.masked_fill(logits < nucleus(logits, sampling.top_p), -torch.inf)
    if sampling.min_p:
        least = logits.amax(-1, keepdim=True) + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


def nucleus(logits: Float[Tensor, "b v"], p: float) -> Float[Tensor, "b 1"]:
    """The least of the fewest largest logits whose probabilities sum to at least p. Sorting all of a large vocabulary
    takes longer than a small model; the largest few are nearly always enough."""
    whole, vocab, size = logits.logsumexp(-1, keepdim=True), logits.shape[-1], 64
    while True:
        ordered = logits.topk(min(size, vocab)).values
        share = (ordered - whole).exp().cumsum(-1)
        if size >= vocab or bool((share[:, -1] >= p).all()):
            before = (share < p).sum(-1, keepdim=True)
            return ordered.gather(1, before.clamp(max=ordered.shape[1] - 1))
        size *= 16


def draw(logits: Float[Tensor, "b v"], draws: Float[Tensor, "b 1"]) -> Int[Tensor, " b"]:
    """One token per row: where the cumulated probability passes a number from [0, 1)."""
    mass = logits.double().softmax(-1).cumsum(-1)
    total = mass[:, -1:]
    check_finite(total)
    at = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass, at, right=True).squeeze(-1)


def check_finite(x: Tensor) -> None:
    """Raise ValueError where a model computes NaN or infinity instead of something to choose from."""
    if not torch.isfinite(x).all():
        raise ValueError("the model's output is not finite: its weights have diverged or are damaged")
