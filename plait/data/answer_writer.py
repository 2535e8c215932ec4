"""Records with answers into shards: tokens, and which of them are learned."""

from array import array
from pathlib import Path

import numpy as np

from plait.data.answers import answered
from plait.data.cache import cached
from plait.data.corpus import FileSource, Source, open_source
from plait.data.errors import DataError
from plait.data.shards import FORMAT, Meta, Shards
from plait.data.tokenizer import Tokenizer
from plait.data.writer import (
    Progress,
    Splitter,
    check_unchanged,
    checked,
    finish,
    id_dtype,
    open_whole,
    shard_key,
    sync,
)
from plait.files import user_path


def prepare_answers(
    source: str | Path | Source,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    length: int,
    heldout: float = 0.02,
    seed: int = 0,
    progress: Progress | None = None,
) -> Shards:
    """As `prepare`, of records with answers (`plait.data.answers_in`): which tokens count is in the shards too.

    A document longer than `length` inputs is cut there, which `meta.cut` counts. Raises DataError naming file and line of a
    record that holds no answer, or none within `length`.
    """
    heldout, seed = checked(heldout, seed)
    cache = user_path(folder)
    opened = source if not isinstance(source, str | Path) else open_source(source, cache)
    assert isinstance(opened, FileSource), opened
    identity, template = opened.identity(), tokenizer.chat_template
    said = None if template is None else [template.text, sorted(template.special.items())]
    key = shard_key(identity, tokenizer, heldout, seed, "answers", length, said)

    def make(temporary: Path) -> None:
        _write_answers(temporary, key, opened, tokenizer, length, heldout, seed, progress)
        check_unchanged(opened, identity)

    return cached(cache, key, open_whole, make)


def _write_answers(
    folder: Path,
    key: str,
    source: FileSource,
    tokenizer: Tokenizer,
    length: int,
    heldout: float,
    seed: int,
    progress: Progress | None,
) -> None:
    dtype, split, offsets, cut = id_dtype(tokenizer), Splitter(heldout, seed), array("q", [0]), 0
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "scored.bin").open("wb") as scored:
        for id, where, document in answered(source, tokenizer):
            whole, kept = sum(document.scored[1:]), document.scored[: length + 1]
            if not any(kept[1:]):
                raise DataError(
                    f"{where}: its answer begins after {document.scored.index(True):,} tokens, beyond the {length:,} of "
                    "data.length: nothing of it is left to learn; give a larger data.length, or leave the record out"
                )
            cut += sum(kept[1:]) < whole
            tokens.write(np.array(document.ids[: length + 1], dtype=dtype).tobytes())
            scored.write(bytes(kept))
            offsets.append(offsets[-1] + len(kept))
            split.add(id)
            if progress is not None and len(split.sides) % 256 == 0:
                progress(tokens.tell(), None)
        sync(tokens)
        sync(scored)
    if len(split.sides) < 2:
        raise DataError(f"{source.spec}: {len(split.sides)} records; expected at least 2, to hold some out")
    split.fill_both_sides()
    meta = Meta(
        format=FORMAT, key=key, source=source.spec, tokenizer=tokenizer.name, vocab=tokenizer.vocab, eos=tokenizer.eos,
        dtype=dtype, tokens=offsets[-1], documents=len(split.sides), heldout_documents=sum(split.sides),
        bytes=source.total_bytes or 0, heldout=heldout, seed=seed, tail_held_out=False, passed_over={}, answers=True, cut=cut,
    )  # fmt: skip
    finish(folder, meta, offsets, split, tokenizer)
