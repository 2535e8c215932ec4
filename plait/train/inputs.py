"""What a run trains on: from its config to tokenizer, shards, batches and the full design; or batches of one's own."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from plait.data import Loader, Shards, Tokenizer, answers_in, cached_bpe, load_tokenizer, prepare, prepare_answers
from plait.design import ModelConfig, Tokens
from plait.model import Objective
from plait.opening import folder_design, model_path
from plait.train.config import DataConfig, RunConfig, resolve_design
from plait.train.heldout import HeldOut, heldout_loss, mean_loss
from plait.train.ranks import Ranks


class Batches(Protocol):
    """Endless training batches (see `plait.model.objective.Batch`) that can say where they are and go on from there.

    A batch without `cu_seqlens` also has `part(start, end)`, its rows from start to end, where a run accumulates; every
    batch has `to(device)`. What `state_dict` gives is written as JSON. Of several ranks each has batches of its own.
    """

    def __next__(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Inputs:
    """batches: to train on; ahead: whether they may be read in a thread: those of one's own could draw from the generators that
    the run draws from; tokenizer: None where they are no text; measure: the objective's loss on what was held out."""

    batches: Batches
    ahead: bool
    tokenizer: Tokenizer | None
    design: ModelConfig
    measure: Callable[[Objective], HeldOut]
    summary: str


def text_inputs(
    run: RunConfig, kept: Path | None, ranks: Ranks, progress: Callable[[int, int | None], None] | None = None
) -> Inputs:
    """Read, tokenize and cache a run's text where that has not been done; `progress(done, total)` counts bytes of text.

    `kept`: where a run that goes on has kept its tokenizer, which is the run's where that names none by itself.
    """
    tokenizer = load_tokenizer(kept) if kept and kept.is_dir() and not names_tokenizer(run) else own_tokenizer(run)
    design = resolve_design(spec(run), tokenizer.vocab)
    if not isinstance(design.front, Tokens):
        raise ValueError(
            "design.front: this model reads vectors, and a run over text has tokens: give `batches` of your own"
        )
    shards = open_shards(run.data, tokenizer, progress)
    check_heldout(run, shards)
    loader = open_loader(run, shards, ranks)
    summary = answers_summary(run, shards) if shards.meta.answers else text_summary(run, loader, shards)

    def measure(objective: Objective) -> HeldOut:
        how = {"batch": run.batch, "length": run.data.length, "tokens": run.eval_tokens, "precision": run.precision}
        return heldout_loss(objective, shards, **how)

    return Inputs(loader, True, tokenizer, design, measure, summary)


def open_shards(
    data: DataConfig,
    tokenizer: Tokenizer,
    progress: Callable[[int, int | None], None] | None = None,
    length: int | None = None,
) -> Shards:
    """A run's text or records as shards, made where they are not there yet. length: of a record; else the run's."""
    how = {"heldout": data.heldout, "progress": progress}
    if answers_in(data.source) is None:
        return prepare(data.source, tokenizer, data.cache, **how)
    return prepare_answers(data.source, tokenizer, data.cache, length=length or data.length, **how)


def text_summary(run: RunConfig, loader: Loader, shards: Shards) -> str:
    reads, asked = run.steps * run.batch * run.data.length, run.data.tokenizer
    passed = ", ".join(f"{count:,} {why}" for why, count in shards.meta.passed_over.items() if count)
    few = isinstance(asked, dict) and shards.meta.vocab < asked["bpe"]
    return (
        f"text: {run.data.source}, {loader.tokens:,} tokens to train on; {run.steps:,} steps of "
        f"{run.batch * run.data.length:,} read {reads:,}, {reads / loader.tokens:.3g} times the text"
        + (f"; documents passed over: {passed}" if passed else "")
        + (f"; it has no more than {shards.meta.vocab:,} tokens for the tokenizer" if few else "")
    )


def answers_summary(run: RunConfig, shards: Shards) -> str:
    meta, scored = shards.meta, shards.scored()
    cut = f"; {meta.cut:,} lost a part of their answers to data.length {run.data.length}" if meta.cut else ""
    return (
        f"records: {run.data.source}, {meta.documents - meta.heldout_documents:,} to train on and {meta.heldout_documents:,} "
        f"held out, {0 if scored is None else int(scored.sum()):,} of {meta.tokens:,} tokens in answers{cut}"
    )


def own_inputs(run: RunConfig, batches: Batches, heldout: Callable[[], Iterable[Any]] | None) -> Inputs:
    """Batches of one's own. `heldout()` gives those to measure on, anew each time."""
    design = resolve_design(spec(run), vocab=None)

    def measure(objective: Objective) -> HeldOut:
        return mean_loss(objective, heldout() if heldout else (), run.precision)

    return Inputs(batches, False, None, design, measure, f"batches of {type(batches).__name__}; {run.steps:,} steps")


def spec(run: RunConfig) -> Any:
    """What says the run's design: itself, or the model that it starts from."""
    if run.design is None and run.start is None:
        raise ValueError("run: 'design' is missing; expected a pattern such as \"(DF)3 AF\", a preset or a mapping")
    if run.design is not None:
        return run.design
    assert run.start is not None
    return folder_design(run.start).to_dict()


def names_tokenizer(run: RunConfig) -> bool:
    """Whether the run names its tokenizer; else it trains one, or takes that of the model it starts from."""
    return isinstance(run.data.tokenizer, str) and (run.start is None or run.data.tokenizer != DataConfig().tokenizer)


def own_tokenizer(run: RunConfig) -> Tokenizer:
    """The run's tokenizer; that of the model it starts from where it names none."""
    if run.start is not None and not names_tokenizer(run) and isinstance(run.data.tokenizer, str):
        place = model_path(run.start)
        if place.is_file() or (place / "tokenizer_config.json").is_file():
            return load_tokenizer(place)
    return open_tokenizer(run.data)


def open_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer that is named, or one trained on the source and kept in the cache."""
    if isinstance(data.tokenizer, str):
        return load_tokenizer(data.tokenizer)
    return cached_bpe(data.source, data.tokenizer["bpe"], data.cache)


def open_loader(run: RunConfig, shards: Shards, ranks: Ranks) -> Loader:
    """The endless, seeded training batches of a run, from the start; of several ranks each reads its share."""
    batch, length, seed = run.batch, run.data.length, run.seed
    return Loader(shards, batch=batch, length=length, seed=seed, rank=ranks.rank, ranks=ranks.size)


def check_heldout(run: RunConfig, shards: Shards) -> None:
    """Raise ValueError where no token of the held-out text can be predicted."""
    starts, ends = shards.documents("heldout")
    if not (ends - starts > 2).any():  # its first token, another, the end of text
        raise ValueError(
            f"{run.data.source}: nothing held out can be predicted; give more text or a larger data.heldout"
        )
