"""Laws of the shards: every document once, on one side for good; whole or not there; found again."""

import contextlib
import os
import resource
import shutil
import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.data import ByteTokenizer, DataError, NotFound, NotText, Shards, cached_bpe, known, prepare, writer

BYTES = ByteTokenizer()
text = st.text(st.sampled_from("ab \né"), min_size=1, max_size=30).filter(lambda text: text.strip())


class Spy(ByteTokenizer):
    """Counts the texts it is given."""

    def __init__(self):
        self.texts = 0

    def encode_batch(self, texts):
        self.texts += len(texts)
        return super().encode_batch(texts)


def numbered(list_source, count, start=0):
    return list_source(tuple((f"doc-{number}", f"document number {number}\n") for number in range(start, count)))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "known.json"}


def left_in(folder):
    return [path.name for path in folder.iterdir() if not path.name.endswith(".lock")]


@settings(deadline=None, max_examples=60)
@given(written=st.lists(text, min_size=2, max_size=8), share=st.floats(0.05, 0.95), seed=st.integers(0, 5))
def test_every_document_is_on_one_side_and_ends(tmp_path_factory, list_source, documents, bpe, written, share, seed):
    source = list_source(tuple((str(number), text) for number, text in enumerate(written)))
    shards = prepare(source, bpe, tmp_path_factory.mktemp("split"), heldout=share, seed=seed)
    sides = [documents(shards, split) for split in ("train", "heldout")]
    assert all(sides)
    assert all(ids[-1] == bpe.eos and bpe.eos not in ids[:-1] for side in sides for ids in side)
    assert sorted(bpe.decode(ids) for side in sides for ids in side) == sorted(written)
    assert shards.meta.documents == len(written)
    assert shards.meta.heldout_documents == len(sides[1])
    assert shards.meta.tokens == sum(len(ids) for side in sides for ids in side)


def test_the_split_is_stable_seeded_and_of_the_right_size(list_source, documents, tmp_path):
    def heldout(count, seed=0, start=0):
        shards = prepare(numbered(list_source, count, start), BYTES, tmp_path, heldout=0.1, seed=seed)
        train, held = ({BYTES.decode(ids) for ids in documents(shards, split)} for split in ("train", "heldout"))
        assert not train & held
        assert len(train | held) == count - start
        return held

    some, more, other = heldout(1000), heldout(2000), heldout(1000, seed=1)
    assert 60 < len(some) < 140  # 100 expected, four standard deviations
    assert some <= more
    assert len(some & other) < 30  # 10 expected of independent draws
    assert heldout(2000, start=1000) == more - some


def test_one_document_is_cut_at_a_line_near_its_end(list_source, documents, tmp_path):
    written = "".join(f"line {number} é\n" for number in range(1000))
    shards = prepare(list_source((("one", written),)), BYTES, tmp_path, heldout=0.1)
    (head,), (tail,) = (documents(shards, split) for split in ("train", "heldout"))
    assert BYTES.decode(head) + BYTES.decode(tail) == written
    assert BYTES.decode(head).endswith("\n")
    assert (head[-1], tail[-1]) == (ord("\n"), BYTES.eos)
    assert 0 < 0.1 * len(written.encode()) - len(tail) < len("line 999 é\n".encode()) + 1
    assert shards.meta.tail_held_out
    assert shards.meta.documents == 1
    for written, cut in (("x" * 100, 91), ("abc", 2), ("a\n\n\n\n\n", 5)):
        shards = prepare(list_source((("one", written),)), BYTES, tmp_path, heldout=0.1)
        assert [len(ids) for split in ("train", "heldout") for ids in documents(shards, split)] == [
            cut,
            len(written) + 1 - cut,
        ]
    with pytest.raises(DataError, match="one document of 2 tokens; expected at least 3, or more documents"):
        prepare(list_source((("one", "ab"),)), BYTES, tmp_path)


@pytest.mark.parametrize("batch", [1, 16, 1 << 20])
def test_binary_and_empty_files_are_taken_back_wherever_they_turn_bad(write, tmp_path, monkeypatch, documents, batch):
    monkeypatch.setattr(writer, "BATCH", batch)
    monkeypatch.setattr("plait.data.text.read_pieces.__defaults__", (32,))
    good = {"a": "first " * 20, "c": "third " * 20, "f": "sixth"}
    for name, content in good.items():
        write(f"in/{name}", content)
    write("in/b", b"second, words and words and words and words and words \xff")
    write("in/d", "")
    write("in/e", "  \n\n")
    write("in/g", b"\x7fELF\0\0")
    write("in/h", b"last, but cut in a character " * 5 + b"\xe6\xbc")
    shards = prepare(tmp_path / "in", BYTES, tmp_path / "out", heldout=0.3)
    found = [BYTES.decode(ids) for split in ("train", "heldout") for ids in documents(shards, split)]
    assert sorted(found) == sorted(good.values())
    assert shards.meta.passed_over == {"binary": 3, "empty": 2}
    assert shards.meta.bytes == sum(map(len, good.values()))
    assert shards.meta.tokens == shards.meta.bytes + 3


def test_shards_are_used_again_and_made_again_when_anything_changed(write, tmp_path):
    for name in "abc":
        write(f"in/{name}", f"document {name}")
    out = tmp_path / "out"

    def works(tokenizer=None, **options):
        spy = tokenizer or Spy()
        prepare(tmp_path / "in", spy, out, **options)
        return spy.texts > 0

    assert works()
    assert not works()
    assert works(seed=1)
    assert works(heldout=0.5)
    other = Spy()
    other.hash = "another tokenizer"
    assert works(other)
    assert not works()
    assert not works(seed=1)
    os.utime(tmp_path / "in/a", ns=(1, 1))
    assert not works()
    write("in/a", "another document")
    assert works()
    write("in/d", "document d")
    assert works()
    assert not works()


def test_incomplete_shards_are_made_again_the_same_to_the_byte(list_source, bpe, tmp_path):
    source = numbered(list_source, 50)
    folder = prepare(source, bpe, tmp_path).folder
    whole = contents(folder)
    assert set(whole) == {"tokens.bin", "offsets.bin", "split.bin", "token_bytes.bin", "meta.json"}
    for name in whole:
        for damage in (lambda path: path.unlink(), lambda path: os.truncate(path, path.stat().st_size // 2)):
            damage(folder / name)
            with pytest.raises((DataError, NotFound)):
                Shards(folder)
            prepare(source, bpe, tmp_path)
            assert contents(folder) == whole
    for name in whole.keys() - {"meta.json"}:  # as long as they were
        damaged = bytearray(whole[name])
        damaged[len(damaged) // 2] ^= 0xFF
        (folder / name).write_bytes(damaged)
        with pytest.raises(DataError, match=f"{name}: damaged; prepare the corpus again"):
            Shards(folder)
        prepare(source, bpe, tmp_path)
        assert contents(folder) == whole
    shutil.rmtree(folder)
    left = tmp_path / f".{folder.name}.tmp"  # of a process that was killed
    left.mkdir()
    (left / "tokens.bin").write_bytes(b"half")
    prepare(source, bpe, tmp_path)
    assert contents(folder) == whole
    assert left_in(tmp_path) == [folder.name]


def test_shards_are_read_through_again_only_where_they_were_written_since(list_source, tmp_path, monkeypatch):
    monkeypatch.setattr(known, "SETTLED", 0)
    read, hashed = known._hash, []
    monkeypatch.setattr(known, "_hash", lambda path: hashed.append(path.name) or read(path))
    folder = prepare(numbered(list_source, 50), BYTES, tmp_path).folder
    hashed.clear()
    Shards(folder)
    assert not hashed
    copied = shutil.copytree(folder, tmp_path / "copied")
    Shards(copied)
    assert sorted(hashed) == ["offsets.bin", "split.bin", "token_bytes.bin", "tokens.bin"]
    hashed.clear()
    Shards(copied)
    assert not hashed
    damaged = bytearray((copied / "tokens.bin").read_bytes())
    damaged[7] ^= 1
    (copied / "tokens.bin").write_bytes(damaged)
    with pytest.raises(DataError, match="tokens.bin: damaged; prepare the corpus again"):
        Shards(copied)


@contextlib.contextmanager
def room_for(size):
    """No file may grow past `size` bytes: the write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 3 << 20])
def test_a_full_disk_leaves_nothing(list_source, tmp_path, size):
    source = list_source(tuple((str(number), "text " * 100_000) for number in range(8)))
    with room_for(size), pytest.raises(OSError, match=str(tmp_path)):
        prepare(source, BYTES, tmp_path)
    assert left_in(tmp_path) == []
    assert prepare(source, BYTES, tmp_path).meta.documents == 8


def test_an_interrupt_leaves_nothing(list_source, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(numbered(list_source, 10), BYTES, tmp_path, progress=interrupt)
    assert left_in(tmp_path) == []


def test_processes_that_come_together_work_once(list_source, tmp_path):
    spies, source = [Spy() for _ in range(4)], numbered(list_source, 300)
    threads = [threading.Thread(target=prepare, args=(source, spy, tmp_path)) for spy in spies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(spy.texts for spy in spies) == [0, 0, 0, 300]


def test_a_corpus_that_changes_meanwhile_is_refused(write, tmp_path):
    for name in "abc":
        write(f"in/{name}", "text")
    with pytest.raises(DataError, match="changed while it was being read"):
        prepare(tmp_path / "in", BYTES, tmp_path / "out", progress=lambda *_: write("in/a", "other text"))
    assert left_in(tmp_path / "out") == []


def test_progress_counts_bytes_up_to_the_total(write, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "BATCH", 1000)
    write("in/a", "é\n" * 3000)
    write("in/b", "b\n" * 3000)
    seen = []
    prepare(tmp_path / "in", BYTES, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (15_000, 15_000)


def test_a_large_vocabulary_is_stored_wider(list_source, tmp_path, documents):
    class Wide(ByteTokenizer):
        vocab, eos, hash = 1 << 17, (1 << 17) - 1, "wide"

        @property
        def byte_lengths(self):
            return BYTES.byte_lengths.repeat(600)[: self.vocab]

    shards = prepare(numbered(list_source, 5), Wide(), tmp_path)
    assert shards.meta.dtype == "uint32"
    assert all(ids[-1] == (1 << 17) - 1 for ids in documents(shards, "train"))
    assert replace(shards.meta, dtype="uint16") != shards.meta


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("empty.txt", "", DataError, "empty.txt: an empty file; expected UTF-8 text"),
        ("blank.txt", "\n \n", DataError, "blank.txt: an empty file"),
        ("binary.txt", b"\x89PNG\0", NotText, "binary.txt: a binary file"),
        ("folder/x", b"\0", DataError, "folder: no text in it .1 binary.; expected at least one document"),
        ("none.jsonl", "", DataError, "no text in it .no documents."),
        ("nulls.jsonl", '{"text": null}\n{"text": ""}', DataError, "no text in it .2 empty."),
    ],
)
def test_a_source_with_nothing_in_it_is_an_error(write, tmp_path, name, content, error, message):
    path = write(name, content)
    spec = path.parent if name.startswith("folder") else path
    with pytest.raises(error, match=message) as caught:
        prepare(spec, BYTES, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert left_in(tmp_path / "out") == []


@pytest.mark.parametrize("spec", ["in", "in/*.txt", "in/rows.jsonl"])
def test_what_was_moved_is_found_and_split_as_before(write, tmp_path, documents, spec):
    for number in range(40):
        write(f"in/{number}.txt", f"text {number}")
    write("in/rows.jsonl", "\n".join(f'{{"text": "row {number}"}}' for number in range(40)))
    tokenizer = Spy()
    shards = prepare(tmp_path / spec, tokenizer, tmp_path / "cache", heldout=0.3)
    held = [BYTES.decode(ids) for ids in documents(shards, "heldout")]
    tokenizer.texts = 0
    (tmp_path / "in").rename(tmp_path / "out")
    assert prepare(tmp_path / f"out{spec[2:]}", tokenizer, tmp_path / "cache", heldout=0.3).key == shards.key
    assert tokenizer.texts == 0
    elsewhere = prepare(tmp_path / f"out{spec[2:]}", tokenizer, tmp_path / "other", heldout=0.3)
    assert [BYTES.decode(ids) for ids in documents(elsewhere, "heldout")] == held


def test_text_that_utf8_cannot_hold_becomes_text(list_source, documents, tmp_path):
    shards = prepare(list_source((("a", "a\ud800b"), ("b", "\0"), ("c", "\ufeffc"))), BYTES, tmp_path)
    found = [BYTES.decode(ids) for split in ("train", "heldout") for ids in documents(shards, split)]
    assert sorted(found) == ["\0", "a\ufffdb", "\ufeffc"]
    with pytest.raises(DataError, match="text is of type int; expected str"):
        prepare(list_source((("a", 3), ("b", "b"))), BYTES, tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="umask and links are POSIX's")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_are_the_umasks(write, bpe, tmp_path, umask):
    write("in/a.txt", "the cat sat " * 50), write("in/b.txt", "the dog ran " * 50)
    before = os.umask(umask)
    try:
        tokenizer = cached_bpe(tmp_path / "in", 270, tmp_path / "cache")
        prepare(tmp_path / "in", tokenizer, tmp_path / "cache")
    finally:
        os.umask(before)
    made = list((tmp_path / "cache").rglob("*"))
    assert len(made) > 8
    assert {path.stat().st_mode & 0o777 for path in made if path.is_file()} == {0o666 & ~umask}
    assert {path.stat().st_mode & 0o777 for path in made if path.is_dir()} == {0o777 & ~umask}


def test_a_cache_by_a_link_or_from_home(write, tmp_path, monkeypatch):
    write("in/a.txt", "text and text")
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to("disk")
    monkeypatch.setenv("HOME", str(tmp_path))
    shards = prepare("~/in", BYTES, "~/cache")
    assert (tmp_path / "cache").is_symlink()
    assert (tmp_path / "disk" / shards.key / "tokens.bin").exists()
    assert Shards(f"~/disk/{shards.key}").key == shards.key


def test_ready_shards_need_nothing_written(write, tmp_path, monkeypatch):
    """As in a cache that only its owner can write."""
    write("in/a.txt", "text and text")
    key = prepare(tmp_path / "in", BYTES, tmp_path / "cache").key

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / "cache" / ".lock"))

    monkeypatch.setattr("plait.data.cache.FileLock", refuse)
    monkeypatch.setattr("plait.data.known.write_text", refuse)
    monkeypatch.setattr("plait.data.known.SETTLED", -(10**12))
    assert prepare(tmp_path / "in", BYTES, tmp_path / "cache").key == key
    with pytest.raises(PermissionError, match=str(tmp_path / "cache")):
        prepare(tmp_path / "in", BYTES, tmp_path / "cache", seed=1)


def test_wrong_arguments(list_source, tmp_path):
    for seed in (-1, 0.5, float("nan"), True, "1", None):
        with pytest.raises(DataError, match="seed=.*expected"):
            prepare(numbered(list_source, 3), BYTES, tmp_path, seed=seed)
    for share in (0, 1, -0.1, 2.0, float("nan"), float("inf"), True, False, "0.1", None):
        with pytest.raises(DataError, match="expected a share between 0 and 1"):
            prepare(numbered(list_source, 3), BYTES, tmp_path, heldout=share)
    with pytest.raises(NotFound, match="no token shards here"):
        Shards(tmp_path)
    shards = prepare(numbered(list_source, 3), BYTES, tmp_path)
    with pytest.raises(DataError, match="did you mean 'heldout'"):
        shards.documents("heldoutt")
    meta = shards.folder / "meta.json"
    meta.write_text(meta.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(DataError, match="format 2, expected 1"):
        Shards(shards.folder)
    for damage in ("", "[]", '{"format": 1}', meta.read_text().replace('"tokens": ', '"tokens": "many", "x": ')):
        meta.write_text(damage)
        with pytest.raises(DataError, match="meta.json: damaged"):
            Shards(shards.folder)
