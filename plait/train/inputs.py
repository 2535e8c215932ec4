"""From a run's config to what it trains on: tokenizer, shards and the full design."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from plait.data import Loader, Shards, Tokenizer, load_tokenizer, open_source, prepare, texts, train_bpe
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
    source, vocab = open_source(data.source), data.tokenizer["bpe"]
    folder = Path(data.cache) / f"bpe-{vocab}-{source.identity()[:16]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)
        try:
            train_bpe(texts(source), vocab).save(temporary)
            if not folder.exists():  # another run may have been faster; equal texts give equal tokenizers
                os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return load_tokenizer(folder)


def open_loader(run: RunConfig, shards: Shards) -> Loader:
    """The endless, seeded training batches of a run, from the start."""
    return Loader(shards, "train", batch=run.batch, length=run.data.length, seed=run.seed)
