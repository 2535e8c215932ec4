"""Which attention layers stay: every rule gives one table of scores, and `choose` reads it."""

from collections.abc import Mapping, Sequence

from plait.convert.learned import ga_s2, gates
from plait.convert.measured import halo, kl, recall, window
from plait.convert.plan import attention_places
from plait.convert.scores import Request, Rule, Scores
from plait.model.language_model import LanguageModel
from plait.model.objective import Batch

SPREAD = ("kl",)  # rules whose layers are spread over the depth; others keep the largest scores (HALO, KL-guided GA-S2)


def uniform(teacher: LanguageModel, request: Request, data: Sequence[Batch]) -> Scores:
    """1 for layers in the middle of as many equal stretches as stay, 0 for others."""
    places = list(attention_places(teacher.design))
    kept = {places[(2 * i + 1) * len(places) // (2 * request.keep)] for i in range(request.keep)}
    return Scores({address: float(address in kept) for address in places})


def listed(teacher: LanguageModel, request: Request, data: Sequence[Batch]) -> Scores:
    """1 for `request.listed`. Raises ValueError for an address that holds no attention, and where these are not as many as
    stay."""
    places = attention_places(teacher.design)
    for address in request.listed:
        if address not in places:
            teacher.design.place(address)  # raises for an address that does not exist
            raise ValueError(f"{address} is not attention")
    if len(set(request.listed)) != request.keep:
        raise ValueError(f"{len(set(request.listed))} layers are listed, but {request.keep} are to stay")
    return Scores({address: float(address in request.listed) for address in places})


RULES: dict[str, Rule] = {
    "kl": kl,
    "halo": halo,
    "recall": recall,
    "window": window,
    "gates": gates,
    "ga-s2": ga_s2,
    "uniform": uniform,
    "list": listed,
}


def choose(scores: Mapping[str, float], keep: int, rule: str) -> list[str]:
    """The addresses that stay, in order: the largest scores, the first of equal ones; or by a rule of `SPREAD` the best
    arrangement that is spread over the depth (`spread`). `scores` has all attention layers in order."""
    addresses, values = list(scores), list(scores.values())
    if not 0 <= keep <= len(addresses):
        raise ValueError(f"{keep} layers cannot stay of {len(addresses)}; give a number from 0 to {len(addresses)}")
    if rule in SPREAD:
        return [addresses[i] for i in spread(values, keep)]
    best = sorted(range(len(values)), key=lambda i: (-values[i], i))[:keep]
    return [addresses[i] for i in sorted(best)]


def spread(values: Sequence[float], keep: int) -> list[int]:
    """SMART's arrangement (Zebra-Llama, section 3) of `keep` of n layers: the first is the best of the first n // keep, the
    last the best of the last n // keep, gaps between are the equal one rounded down or up, and of all arrangements like
    this it has the largest sum."""
    n = len(values)
    if keep < 2:
        return [max(range(n), key=lambda i: values[i])] * keep
    ends = n // keep
    first = max(range(ends), key=lambda i: values[i])
    last = max(range(n - ends, n), key=lambda i: values[i])
    gap, longer = divmod(last - first, keep - 1)  # `longer` gaps are one more than `gap`
    best: dict[int, tuple[float, list[int]]] = {0: (values[first], [first])}  # by longer gaps so far
    for step in range(1, keep):
        reached: dict[int, tuple[float, list[int]]] = {}
        for used, (total, chosen) in best.items():
            for more in (used, used + 1):
                at = first + step * gap + more
                if more <= longer and longer - more <= keep - 1 - step:
                    found = total + values[at], [*chosen, at]
                    if more not in reached or found[0] > reached[more][0]:
                        reached[more] = found
        best = reached
    return best[longer][1]
