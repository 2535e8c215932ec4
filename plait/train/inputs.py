"""From a run's config to what it trains on: tokenizer, shards and the full design."""

from collections.abc import Callable

from plait.data import Loader, Shards, Tokenizer, cached_bpe, load_tokenizer, prepare
from plait.design import ModelConfig
from plait.train.config import DataConfig, RunConfig, resolve_design


def open_inputs(
    run: RunConfig, progress: Callable[[int, int | None], None] | None = None
) -> tuple[Tokenizer, Shards, ModelConfig]:
    """Read, tokenize and cache the text where that has not been done; `progress(done, total)` counts bytes of text."""
    tokenizer = open_tokenizer(run.data)
    design = resolve_design(run.design, tokenizer.vocab)
    shards = prepare(run.data.source, tokenizer, run.data.cache, heldout=run.data.heldout, progress=progress)
    return tokenizer, shards, design


def open_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer that is named, or one trained on the source and kept in the cache."""
    if isinstance(data.tokenizer, str):
        return load_tokenizer(data.tokenizer)
    return cached_bpe(data.source, data.tokenizer["bpe"], data.cache)


def open_loader(run: RunConfig, shards: Shards) -> Loader:
    """The endless, seeded training batches of a run, from the start."""
    return Loader(shards, "train", batch=run.batch, length=run.data.length, seed=run.seed)
