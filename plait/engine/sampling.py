"""From logits to tokens."""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from plait.design.struct import Struct
from plait.ops.numbers import power_of_two


class Sampling(Struct, frozen=True, kw_only=True, tag=False):
    """How the next token is chosen: at temperature 0 the likeliest, above 0 a sample of softmax(logits / temperature).

    What may be sampled is narrowed in this order: `top_k` keeps the k likeliest tokens; `top_p` the fewest tokens whose
    probabilities sum to at least p; `min_p` those at least min_p times as likely as the likeliest. Before all that,
    `repetition_penalty` (arXiv 1909.05858) divides the positive and multiplies the negative logits of tokens that the
    prompt or the continuation already holds.

    Row r of a batch draws from `seed` + r, and each of its numbers follows from that seed and the position it is drawn at: its
    text is what it would be alone with that seed, whoever its mates are. In 16 bits that is so while the logits are
    equal: their last digits may depend on how many rows are multiplied at once.
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


ALL = 2**62  # top-k of a row that has none


class Narrowing(NamedTuple):
    """What any row of a batch asks for: which steps there are depends on this alone. `top_k`: at least the largest, a power of
    two, so that few different ones are captured; 0 for none."""

    sampled: bool = False
    top_k: int = 0
    top_p: bool = False
    min_p: bool = False
    penalty: bool = False

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> "Narrowing":
        return cls(
            any(s.temperature > 0 for s in samplings),
            max((power_of_two(min(s.top_k, ALL)) for s in samplings if s.top_k), default=0),
            any(s.top_p is not None and s.top_p < 1 for s in samplings),
            any(s.min_p for s in samplings),
            any(s.repetition_penalty != 1 for s in samplings),
        )


GREEDY = Narrowing()


class Options(NamedTuple):
    """A number for each row, on the device; where a row does not ask for it, one that changes nothing."""

    temperature: Float[Tensor, " b"]
    top_k: Int[Tensor, " b"]
    top_p: Float[Tensor, " b"]
    min_p: Float[Tensor, " b"]
    penalty: Float[Tensor, " b"]
    key: Int[Tensor, " b"]  # of the row's random numbers

    @classmethod
    def of(cls, samplings: Sequence[Sampling], seeds: Sequence[int], device: torch.device) -> "Options":
        def numbers(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)

        return cls(
            numbers([s.temperature for s in samplings]),
            torch.tensor([min(s.top_k or ALL, ALL) for s in samplings], device=device),
            numbers([1.0 if s.top_p is None else s.top_p for s in samplings]),
            numbers([s.min_p or 0.0 for s in samplings]),
            numbers([s.repetition_penalty for s in samplings]),
            torch.tensor([key(seed) for seed in seeds], device=device),
        )


class Sampler:
    """Chooses tokens for rows: knows what each asks for and, where one has a repetition penalty, the tokens it has held.

    All of it is on the device and by row, so that choosing is a function of device tensors.
    """

    def __init__(self, samplings: Sequence[Sampling], seeds: Sequence[int], vocab: int, device: torch.device):
        self.samplings, self.vocab = list(samplings), vocab
        self.narrowing = Narrowing.of(samplings)
        self.options = Options.of(samplings, seeds, device)
        self.held: Bool[Tensor, "rows v"] | None = None
        self._hold_where_asked()

    def _hold_where_asked(self) -> None:
        if self.narrowing.penalty and self.held is None:
            shape = len(self.samplings), self.vocab
            self.held = torch.zeros(shape, dtype=torch.bool, device=self.options.key.device)

    def assign(self, row: int, sampling: Sampling, seed: int) -> None:
        """The row is another sequence's now: this is what it asks for, and it holds no tokens yet."""
        self.samplings[row] = sampling
        self.narrowing = Narrowing.of(self.samplings)
        for x, (value,) in zip(self.options, Options.of([sampling], [seed], self.options.key.device), strict=True):
            x[row] = value
        self._hold_where_asked()
        self.forget(row)

    def hold(self, row: int, tokens: Sequence[int]) -> None:
        """Tokens that a row holds from the start."""
        if self.held is not None:
            self.held[row, torch.tensor(tokens, device=self.held.device)] = True

    def forget(self, row: int) -> None:
        """The row holds no tokens now."""
        if self.held is not None:
            self.held[row] = False

    def move(self, row: int, to: int) -> None:
        """A row has another place now."""
        self.samplings[to] = self.samplings[row]
        for x in (*self.options, *([] if self.held is None else [self.held])):
            x[to] = x[row]

    def choose(
        self, logits: Float[Tensor, "b v"], index: slice | Int[Tensor, " b"], positions: Int[Tensor, " b"] | None
    ) -> Int[Tensor, " b"]:
        """The next token of the rows at `index`; -1 where the logits are not finite. `positions`: tokens that these rows have
        so far, None where all are greedy."""
        if self.narrowing == GREEDY:
            return logits.max(-1).indices  # argmax, which takes three times as long on a CPU
        options = Options._make([x[index] for x in self.options])
        if self.held is not None:
            logits = torch.where(self.held[index], penalised(logits, options.penalty), logits)
        tokens = logits.max(-1).indices
        if self.narrowing.sampled and positions is not None:
            drawn = draw(narrow(logits, options, self.narrowing), uniform(options.key, positions))
            tokens = torch.where(options.temperature > 0, drawn, tokens)
        if self.held is not None:
            self.held[index] |= torch.nn.functional.one_hot(tokens.clamp_min(0), self.held.shape[1]).bool()
        return tokens


def penalised(logits: Float[Tensor, "b v"], penalty: Float[Tensor, " b"]) -> Float[Tensor, "b v"]:
    limits = torch.finfo(logits.dtype)  # or with all tokens at infinity there were nothing to choose by
    factor = penalty.clamp(limits.tiny, limits.max).to(logits.dtype)[:, None]
    return torch.where(logits < 0, logits * factor, logits / factor).clamp(limits.min, limits.max)


def narrow(logits: Float[Tensor, "b v"], options: Options, narrowing: Narrowing) -> Float[Tensor, "b v"]:
    """Logits over the temperature, the largest 0, -inf for tokens that top-k, top-p or min-p rule out; float32 or wider."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits - logits.amax(-1, keepdim=True)  # or over a small temperature the likeliest would be infinite
    limits = torch.finfo(logits.dtype)
    logits = logits / options.temperature.clamp(limits.tiny, limits.max).to(logits.dtype)[:, None]
    if narrowing.top_k:
        largest = logits.topk(min(narrowing.top_k, logits.shape[-1])).values
        place = options.top_k.clamp_max(largest.shape[-1])[:, None] - 1
        least = largest.gather(1, place)
        logits = logits.masked_fill((logits < least) & (options.top_k < ALL)[:, None], -torch.inf)
    if narrowing.top_p:
        least = nucleus(logits, options.top_p[:, None])
        logits = logits.masked_fill((logits < least) & (options.top_p < 1)[:, None], -torch.inf)
    if narrowing.min_p:
        least = logits.amax(-1, keepdim=True) + options.min_p.log().to(logits.dtype)[:, None]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


def nucleus(logits: Float[Tensor, "b v"], p: Float[Tensor, "b 1"]) -> Float[Tensor, "b 1"]:
    """The least of the fewest largest logits whose probabilities sum to at least p. On a CPU sorting all of a large vocabulary
    takes longer than a small model, and the largest few are nearly always enough; a GPU sorts faster than it can be asked."""
    whole, vocab = logits.logsumexp(-1, keepdim=True), logits.shape[-1]
    size = 64 if logits.device.type == "cpu" else vocab
    while True:
        ordered = logits.topk(min(size, vocab)).values
        share = (ordered - whole).exp().cumsum(-1)
        if size >= vocab or bool((share[:, -1:] >= p).all()):
            before = (share < p).sum(-1, keepdim=True)
            return ordered.gather(1, before.clamp(max=ordered.shape[1] - 1))
        size *= 16


def draw(logits: Float[Tensor, "b v"], draws: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """One token per row: where the cumulated probability passes a number from [0, 1); -1 where there are no probabilities."""
    mass = logits.double().softmax(-1).cumsum(-1)
    total = mass[:, -1:]
    at = torch.minimum(draws[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(mass, at, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)
    return torch.where(torch.isfinite(total[:, 0]), tokens, -1)


def key(seed: int) -> int:
    """64 bits for any whole number: seeds that differ, however far apart or below 0, begin at unrelated ones."""
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "little", signed=True)


def uniform(keys: Int[Tensor, " b"], positions: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Numbers from [0, 1) in float64, the `positions`-th of each key's: SplitMix64 (Steele, Lea and Flood 2014, figure 17),
    whose numbers can be counted to. Whole numbers of torch wrap around as it wants."""
    z = keys + (positions + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shifted(z, 31)
    return _shifted(z, 11).double() * 2.0**-53


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right, zeros from the left."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def check_finite(x: Tensor) -> None:
    """Raise ValueError where a model computes NaN or infinity instead of something to choose from."""
    if not torch.isfinite(x).all():
        raise not_finite()


def not_finite() -> ValueError:
    return ValueError("the model's output is not finite: its weights have diverged or are damaged")
