"""From what a conversion asks for to its plan: which attention layers stay, and what the others become."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from plait.convert.conversion import Conversion
from plait.convert.parallel import BEGINNING, alone, standing_for, target
from plait.convert.plan import Cost, Plan, attention_places
from plait.convert.scores import Request, Score
from plait.convert.select import RULES, choose
from plait.design.layers import KINDS, LETTERS, Attention, FeedForward, Layer, MixtureOfExperts
from plait.design.model import ModelConfig
from plait.design.places import Node, Place, alike, pairs
from plait.design.spelling import suggest
from plait.model import LanguageModel
from plait.model.objective import Batch

SHARE, WHOLE = re.compile(r"(\d+(?:\.\d+)?)\s*%"), re.compile(r"-?\d+")
KEEP = "25%"  # what stays where nothing is said
RULE = "uniform"


def make_plan(
    asked: Conversion,
    teacher: LanguageModel,
    data: Callable[[], Sequence[Batch]],
    scores: Mapping[str, Score],
) -> Plan:
    """The plan that a conversion asks for. data: what a rule measures on, asked for where one does; scores: how good a model
    is, by the name of what is measured (`recall`, `commonsense`), for the rules that ask.

    Raises ValueError for a pattern, a mixer or a rule that cannot be.
    """
    places = attention_places(teacher.design)
    if not places:
        raise ValueError(
            f"{asked.teacher}: {teacher.design.pattern!r} has no attention to replace; expected a transformer, or a hybrid"
        )
    if asked.to is not None and asked.mixer:
        raise ValueError("give --to, a whole pattern, or --mixer, what takes attention's place, not both")
    laid = {} if asked.to is None else laid_out(teacher.design, asked.to)
    if asked.to is not None and asked.select is None:
        if asked.keep is not None:
            raise ValueError("--to says which layers stay; --keep goes with --mixer, or with --select")
        return Plan.of(teacher, asked.teacher, laid, rule="pattern", seed=asked.seed)
    mixers = [*laid.values()] or [mixer_of(name, teacher.design) for name in asked.mixer]
    if not mixers:
        raise ValueError('say what takes attention\'s place: --to PATTERN, such as "((DF)3 AF)", or --mixer D')
    keep, listed = kept(asked, teacher.design, len(places) - len(laid) if laid else None)
    rule = asked.select or ("list" if listed else RULE)
    if rule not in RULES:
        raise ValueError(f"--select: there is no rule {rule!r}; {suggest(rule, RULES)}")
    if (rule == "list") is not bool(listed):
        raise ValueError(
            f"--select {rule} and --keep {asked.keep!r}: addresses such as A#3,A#7 are for the rule list alone, which needs "
            "them; other rules choose so many layers, or a share"
        )
    measures = rule not in ("uniform", "list")
    for address in places if measures else ():
        for mixer in mixers:
            target(places[address], mixer, f"plan: {address}")  # raises before anything is read
    score, other = scores.get("recall"), scores.get("commonsense")
    mixer = alone(mixers[0])
    request = Request(mixer, keep, seed=asked.seed, listed=listed, score=score, commonsense=other)
    found = RULES[rule](teacher, request, data() if measures else ())
    stay = choose(found.scores, keep, rule)
    gone = [address for address in places if address not in stay]
    replace = {address: mixers[i % len(mixers)] for i, address in enumerate(gone)}
    cost = Cost(tokens=found.tokens, seconds=round(found.seconds, 3))
    return Plan.of(teacher, asked.teacher, replace, rule=rule, scores=found.scores, cost=cost, seed=asked.seed)


def kept(asked: Conversion, design: ModelConfig, of_pattern: int | None) -> tuple[int, tuple[str, ...]]:
    """How many attention layers stay, and which, where that is said."""
    keep = asked.keep if asked.keep is not None else of_pattern if of_pattern is not None else KEEP
    places, listed = attention_places(design), keep if isinstance(keep, tuple) else ()
    count = len(listed) if isinstance(keep, tuple) else share(str(keep), len(places))
    if count is None:
        listed = tuple(dict.fromkeys(word.strip() for word in str(keep).split(",")))
        count = len(listed)
    for address in listed:
        if address not in places:
            design.place(address)  # raises for an address that does not exist
            raise ValueError(f"--keep: {address} is not attention; expected some of {', '.join(places)}")
    if not 0 <= count < len(places):
        raise ValueError(
            f"--keep {keep}: {count} of {len(places)} attention layers; expected from 0 to {len(places) - 1}, so that one goes"
        )
    return count, listed


def share(text: str, of: int) -> int | None:
    """How many of so many "25%" or "4" are; None for what is neither."""
    if found := SHARE.fullmatch(text.strip()):
        return round(float(found[1]) / 100 * of)
    return int(text) if WHOLE.fullmatch(text.strip()) else None


# Times the teacher's width, where only the kinds of a pattern's layers are asked for: letters' usual sizes fit no width that is
# not a multiple of 64, and what is put in attention's place has attention's sizes.
WIDER = 64


def mixer_of(name: str, design: ModelConfig) -> dict[str, Any]:
    """What a letter, a kind or "[D|A]" stands for."""
    name = name.strip()
    if name.startswith("["):
        slots = ModelConfig(vocab=design.vocab, dim=design.dim * WIDER, pattern=name, merge=BEGINNING).slots
        if len(slots) != 1:
            raise ValueError(f"--mixer: {name!r} is {len(slots)} slots; expected one, such as '[D|A]'")
        return standing_for(slots[0], LETTERS, "--mixer")
    if name in LETTERS:
        return LETTERS[name].to_dict()
    if name in KINDS:
        return {"kind": name}
    raise ValueError(f"--mixer: there is no letter or kind {name!r}; {suggest(name, [*LETTERS, *KINDS])}")


def laid_out(design: ModelConfig, pattern: str) -> dict[str, dict[str, Any]]:
    """What takes the place of which attention layer where the teacher is to have `pattern`, repeated to its depth. Raises
    ValueError where the two do not fit slot by slot."""
    wide = design.dim * WIDER
    drawn = ModelConfig(vocab=design.vocab, dim=wide, pattern=pattern, layers=design.layers, merge=BEGINNING)
    bound, slots = LETTERS | dict(design.layers), drawn.slots
    if len(slots) > len(design.slots):
        raise ValueError(
            f"--to {pattern!r} has {len(slots)} slots, the teacher {len(design.slots)}: {design.pattern!r}"
        )
    found: dict[str, dict[str, Any]] = {}
    for i, mine in enumerate(design.slots):
        new = slots[i % len(slots)]
        if not _fit(mine, new):
            raise ValueError(
                f"--to {pattern!r} has {new.address} where the teacher has {mine.address}: its slots must be the teacher's, "
                f"{design.pattern!r}, with other mixers in the place of attention"
            )
        for old, own in pairs((mine,), (new,)):
            if isinstance(old, Place) and isinstance(old.layer, Attention) and not _stays(old, own):
                found[old.address] = standing_for(own, bound, f"--to {pattern!r}")
    if not found:
        raise ValueError(f"--to {pattern!r} replaces nothing of the teacher's {design.pattern!r}")
    return found


def _stays(mine: Place, new: Node) -> bool:
    """Whether the pattern leaves an attention layer what it is: by its own letter, or by one that sees all, as A does."""
    if not isinstance(new, Place) or not isinstance(new.layer, Attention):
        return False
    return new.letter == mine.letter or new.layer.window is None


def _fit(mine: Node, new: Node) -> bool:
    """Whether the teacher's slot can become this one: attention anything that mixes, any other layer itself."""
    if isinstance(mine, Place) and isinstance(new, Place):
        return _layers_fit(mine.layer, new.layer)
    if isinstance(mine, Place) or isinstance(new, Place):
        return isinstance(mine, Place) and isinstance(mine.layer, Attention)
    inner = zip(sum(mine.branches, ()), sum(new.branches, ()), strict=False)
    return alike(mine, new) and all(_fit(*pair) for pair in inner)


def _layers_fit(mine: Layer, new: Layer) -> bool:
    apart = (FeedForward, MixtureOfExperts)
    if isinstance(mine, Attention):
        return not isinstance(new, apart)
    if isinstance(mine, apart):
        return isinstance(new, apart)  # the pattern's F stands for whatever the teacher has there
    return type(mine) is type(new)
