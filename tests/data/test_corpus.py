"""Sources: what they read, in which order, and what they say when they cannot."""

import gzip
import itertools
import json
import lzma
import os
import shutil
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.data import DataError, NotFound, NotText, known, open_source, texts
from plait.data.text import cut_pieces, read_pieces


def read(spec):
    return {document.id: "".join(document.pieces) for document in open_source(spec).documents()}


@settings(deadline=None, max_examples=400)
@given(
    text=st.text(st.sampled_from("ab 漢é\n\r\t👩0,"), max_size=300) | st.text(st.characters(exclude_categories=["Cs"])),
    size=st.integers(1, 40),
)
def test_pieces_are_the_text_and_its_tokens(tmp_path_factory, bpe, text, size):
    path = tmp_path_factory.mktemp("pieces") / "text"
    path.write_bytes(text.encode())
    if "\0" not in text:
        assert "".join(read_pieces(path, size)) == text.removeprefix("\ufeff")
    pieces = list(cut_pieces(text, size))
    assert "".join(pieces) == text
    assert all(pieces)
    # Not where a long word or a long blank had to be cut.
    if all(not before[-1].isspace() and after[0] in " \t\r\n" for before, after in itertools.pairwise(pieces)):
        assert [id for piece in pieces for id in bpe.encode(piece)] == bpe.encode(text)


def test_words_are_not_cut():
    text = "the quick, brown fox jumps. over\n\nlazy dogs " * 200
    pieces = list(cut_pieces(text, 500))
    assert len(pieces) > 15
    assert all(len(piece) < 600 and piece.startswith(" ") for piece in pieces[1:])
    assert all(len(piece) <= 8192 for piece in cut_pieces("x" * 50_000, 8192))


def test_a_file_is_one_document_to_the_byte(write):
    text = "a\r\nb\n\n\ufeff\u2028 c\r"
    assert read(write("a.txt", text)) == read(write("a.txt", "\ufeff" + text)) == {"a.txt": text}


def test_a_folder_is_its_text_files_in_order(write, tmp_path):
    for name in ("b.txt", "a/z.md", "a/b.py", ".git/config", "a/.hidden"):
        write(name, name)
    assert read(tmp_path) == {"a/b.py": "a/b.py", "a/z.md": "a/z.md", "b.txt": "b.txt"}
    assert list(read(tmp_path)) == ["a/b.py", "a/z.md", "b.txt"]


def test_a_glob_is_what_matches(write, tmp_path, monkeypatch):
    for name in ("data/a.md", "data/b.txt", "data/deep/er/c.md"):
        write(name, name)
    assert list(read(tmp_path / "data/*.md")) == ["a.md"]
    assert list(read(tmp_path / "data/**/*.md")) == ["a.md", "deep/er/c.md"]
    monkeypatch.chdir(tmp_path)
    assert list(read("data/**/*.md")) == ["a.md", "deep/er/c.md"]
    write("data/[x].txt", "a path that exists wins over a glob")
    assert list(read("data/[x].txt")) == ["[x].txt"]


def test_jsonl_fields(write, tmp_path):
    lines = [{"text": "one", "body": "1"}, {"text": "t\u2028wo", "body": "2"}, {"text": None, "body": "3"}]
    path = write("x.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    assert read(path) == {"1": "one", "2": "t\u2028wo", "3": ""}
    assert list(read(f"{path}:body").values()) == ["1", "2", "3"]
    assert read(f"{tmp_path}/*.jsonl:body") == {"x.jsonl:1": "1", "x.jsonl:2": "2", "x.jsonl:3": "3"}
    assert list(read(f"{tmp_path}:body").values()) == ["1", "2", "3"]
    half = write("half.jsonl", '{"text": "a\\ud800b \\ud83d\\ude00"}')
    assert list(read(half).values()) == ["a\ufffdb 😀"]


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.txt", MARK + b"tale", ["tale"]),
        ("a.txt", MARK, [""]),
        ("a.jsonl", MARK + b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n', ["a", "b"]),
        ("two-joined.jsonl", MARK + b'{"text": "a"}\n' + MARK + b'{"text": "b"}\n' + MARK + b"\n", ["a", "b"]),
        ("ROWS.NDJSON", b'{"text": "a"}', ["a"]),
        ("long.jsonl", b'{"text": "a", "n": [-' + b"7" * 9000 + b", 1e999]}", ["a"]),
        ("nul.jsonl", b'{"text": "a\\u0000b"}', ["a\0b"]),
        ("mark.jsonl", b'{"text": "\\ufeffa"}', ["\ufeffa"]),
        ("line.jsonl", b'{"text": "' + b"a " * (1 << 20) + b'"}', ["a " * (1 << 20)]),
        ("line.txt", b"a" * (3 << 20), ["a" * (3 << 20)]),
    ],
    ids=range(10),
)
def test_odd_files_are_read(write, name, content, texts):
    got = list(read(write(name, content)).values())
    assert got == texts


def test_a_mark_of_byte_order_does_not_depend_on_where_blocks_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(MARK + "é\ufeff".encode())
    for size in range(1, 9):
        assert "".join(read_pieces(path, size)) == "é\ufeff"


@pytest.fixture
def linked(write, tmp_path):
    """in/: two files and two folders, three of these four links, beside links that lead nowhere, upwards and to each other."""
    write("disk/far.txt", "far"), write("disk/deep/er.txt", "deeper"), write("disk/.hidden", "hidden")
    write("in/own/near.txt", "near")
    for name, target in [
        ("in/link", "../disk"), ("in/own/file.txt", "../../disk/far.txt"), ("in/own/up", ".."), ("disk/back", "../in"),
        ("in/nothing", "gone"), ("in/self", "self"), ("in/.secret", "../disk"),
    ]:  # fmt: skip
        (tmp_path / name).symlink_to(target)
    return tmp_path / "in"


@pytest.mark.skipif(os.name != "posix", reason="makes links")
def test_links_are_followed_and_to_an_end(linked):
    everything = {
        "link/deep/er.txt": "deeper",
        "link/far.txt": "far",
        "own/file.txt": "far",
        "own/near.txt": "near",
    }
    assert read(linked) == everything
    for pattern in ("**", "**/*.txt", "**/**/*.t?t", "[!x]*/**/*"):
        assert read(linked / pattern) == everything
    assert list(read(linked / "*/*.txt")) == ["link/far.txt", "own/file.txt", "own/near.txt"]
    assert list(read(linked / "*/deep/*")) == ["link/deep/er.txt"]
    assert list(read(linked / "own/up/link/*.txt")) == ["far.txt"]  # spelled out
    assert list(read(linked / ".s*/*.txt")) == [".secret/far.txt"]


def test_a_folder_that_cannot_be_listed_is_named(write, tmp_path, monkeypatch):
    write("in/a.txt", "a"), write("in/closed/b.txt", "b")
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr("os.scandir", scandir)
    with pytest.raises(PermissionError, match="closed"):
        open_source(tmp_path / "in")


def test_paths_begin_at_home(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("in/a.txt", "a"), write("in/rows.jsonl", '{"text": "b", "c": "d"}')
    assert read("~/in") == {"a.txt": "a", "rows.jsonl:1": "b"}
    assert list(read("~/in/*.txt").values()) == ["a"]
    assert list(read("~/in/rows.jsonl:c").values()) == ["d"]
    with pytest.raises(NotFound, match="did you mean '~/in/a.txt'"):
        open_source("~/in/a.tx")


def test_stdlib_is_source_without_its_tests():
    source = open_source("stdlib")
    documents = list(source.documents())
    names = [document.id for document in documents]
    assert "json/decoder.py" in names
    assert names == sorted(names)
    assert not any("test" in name.split("/")[:-1] or "site-packages" in name for name in names)
    assert 3e6 < source.total_bytes < 60e6
    text = next("".join(document.pieces) for document in documents if document.id == "json/decoder.py")
    with open(json.decoder.__file__, newline="", encoding="utf-8") as file:
        assert text == file.read()
    assert source.identity() == open_source("stdlib").identity()


def test_identity_is_that_of_the_documents(write, tmp_path):
    write("in/a.txt", "one")
    write("in/b/rows.jsonl", '{"text": "a", "other": "c"}')
    seen = [open_source(tmp_path / "in").identity()]

    def changed():
        seen.append(open_source(tmp_path / "in").identity())
        return seen[-1] not in seen[:-1]

    assert not changed()
    write("in/a.txt", "two")
    assert changed()
    write("in/c.txt", "one")
    assert changed()
    (tmp_path / "in/c.txt").rename(tmp_path / "in/d.txt")
    assert changed()
    path = tmp_path / "in/b/rows.jsonl"
    assert open_source(path).identity() == open_source(f"{path}:text").identity()
    assert open_source(path).identity() != open_source(f"{path}:other").identity()


@pytest.mark.parametrize("spec", ["in", "in/*.txt", "in/**/*", "in/a.txt", "in/b/rows.jsonl", "in/b/rows.jsonl:other"])
def test_identity_and_ids_stay_where_files_are_touched_copied_or_moved(write, tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    write("in/a.txt", "one")
    write("in/b/rows.jsonl", '{"text": "a", "other": "c"}\n{"text": "b", "other": "d"}')
    documents, identity = read(spec), open_source(spec).identity()
    os.utime("in/a.txt", ns=(1, 1))
    assert open_source(spec).identity() == identity
    shutil.copytree("in", "elsewhere/out")
    assert open_source(f"{tmp_path}/elsewhere/out{spec[2:]}").identity() == identity
    assert read(f"elsewhere/out{spec[2:]}") == documents


@pytest.mark.parametrize(("name", "content"), [("tale.txt", "once"), ("rows.jsonl", '{"text": "a"}')])
def test_one_file_may_be_renamed(write, tmp_path, name, content):
    path = write(name, content)
    identity, texts = open_source(path).identity(), list(read(path).values())
    renamed = path.rename(tmp_path / f"other{path.suffix.upper()}")
    assert open_source(renamed).identity() == identity
    assert list(read(renamed).values()) == texts


def test_an_unchanged_file_is_not_read_again(write, tmp_path, monkeypatch):
    source, memory, hashed = tmp_path / "in", tmp_path / "cache", []
    kept = known._hash
    monkeypatch.setattr(known, "_hash", lambda path: hashed.append(path.name) or kept(path))
    monkeypatch.setattr(known, "SETTLED", -(10**12))  # as if what is written here had been written long ago
    write("in/a", "one"), write("in/b", "two")

    def reads():
        hashed.clear()
        identities.append(open_source(source, memory).identity())
        return sorted(hashed)

    identities = []
    assert reads() == ["a", "b"]
    assert reads() == []
    mark = (source / "a").stat()
    write("in/a", "ONE")
    os.utime(source / "a", ns=(mark.st_atime_ns, mark.st_mtime_ns))  # as long, as old, and another text
    assert reads() == ["a"]
    assert identities[0] == identities[1] != identities[2]
    for damage in (b"", b"[1]", b'{"x": 3}', b"\xff"):
        next((memory / ".known").iterdir()).write_bytes(damage)
        assert reads() == ["a", "b"]
    assert identities[2] == identities[-1]
    monkeypatch.setattr(known, "SETTLED", 10**12)  # written just now, perhaps again within a tick of the clock
    assert reads() == []
    assert reads() == ["a", "b"]


def test_texts_pass_over_what_is_not_text(write, tmp_path):
    write("a", "good")
    path = write("b", b"bad \xff")
    assert list(texts(open_source(tmp_path))) == ["good"]
    with pytest.raises(NotText):
        list(texts(open_source(path)))


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("stdlb", NotFound, "source 'stdlb': no such file or folder; expected stdlib, .*; did you mean 'stdlib'"),
        ("poem.tx", NotFound, "did you mean 'poem.txt'"),
        ("poems/*.md", NotFound, "no file matches"),
        ("rows.josnl:text", NotFound, "did you mean 'rows.jsonl'"),
        ("rows.jsonl.gz:text", NotFound, "no such file"),
        ("missing.jsonl:text", NotFound, "source 'missing.jsonl'"),
        ("poem.txt:text", DataError, "':text' names a field, and only .jsonl, .ndjson and .parquet files have fields"),
        ("nul", NotText, "nul: a binary file .a zero byte at 1.; expected UTF-8 text"),
        ("latin", NotText, "latin: byte 2097152 .0xe9. is not UTF-8"),
        ("short", NotText, "short: byte 1 .0xe6. is not UTF-8"),
        (
            "rows.jsonl:txt",
            DataError,
            "rows.jsonl, line 2: no field 'txt', its fields are 'text', 'id'; did you mean 'text'",
        ),
        ("numbers.jsonl", DataError, "line 1: field 'text' is int; expected a string"),
        ("list.jsonl", DataError, "line 1: list found; expected a JSON object"),
        ("broken.jsonl", DataError, "line 1: not JSON"),
        ("bytes.jsonl", NotText, "line 1: not UTF-8"),
        ("utf16.txt", NotText, "utf16.txt: UTF-16 text; expected UTF-8 text"),
        ("utf16.jsonl", NotText, "utf16.jsonl, line 1: UTF-16; expected one JSON object"),
        ("deep.jsonl", DataError, "deep.jsonl, line 2: nested too deeply"),
        ("padded.jsonl", DataError, "padded.jsonl, line 2: not JSON"),
        ("rows.gz", NotText, "rows.gz: compressed .gzip.; expected UTF-8 text, unpack it first"),
        ("packed.jsonl", NotText, "packed.jsonl: compressed .xz."),
        ("rows.gz:text", DataError, "rows.gz:text: a compressed file; unpack it first"),
        ("", DataError, "source ''; expected stdlib"),
        ("a\0b", DataError, "expected stdlib"),
        (7, DataError, "source of type int; expected stdlib"),
        ("~no-such-user-here/a", ValueError, "no such user"),
        ("hf:", DataError, "no dataset named; expected hf:NAME_OR_PATH"),
        ("/dev/null", DataError, "neither a file nor a folder"),
    ],
)
def test_wrong_sources_say_what_was_expected(write, tmp_path, monkeypatch, spec, error, message):
    monkeypatch.chdir(tmp_path)
    write("poem.txt", "a poem")
    write("rows.jsonl", '\n{"text": "a", "id": "1"}\n')
    write("numbers.jsonl", '{"text": 3}')
    write("list.jsonl", "[1]")
    write("broken.jsonl", '{"text": ')
    write("bytes.jsonl", b'{"text": "\xff"}')
    write("utf16.txt", "tale".encode("utf-16"))
    write("utf16.jsonl", '{"text": "a"}'.encode("utf-16"))
    write("deep.jsonl", '{"text": "a"}\n{"text": ' + "[" * 200_000)
    write("padded.jsonl", b'{"text": "a"}\n\0\0\0\0')
    write("rows.gz", gzip.compress(b'{"text": "a"}'))
    write("packed.jsonl", lzma.compress(b'{"text": "a"}'))
    write("nul", b"a\0b")
    write("latin", b"a" * (2 << 20) + b"\xe9a")
    write("short", b"a\xe6\xbc")
    with pytest.raises(error, match=message) as caught:
        read(spec)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, FileNotFoundError) == (error is NotFound)


@pytest.mark.parametrize(("module", "spec"), [("pyarrow.parquet", "x.parquet:text"), ("datasets", "hf:some/set")])
def test_a_missing_extra_is_named(write, tmp_path, monkeypatch, module, spec):
    write("x.parquet", b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"needs {module}, which is not installed; pip install 'plait\[datasets\]'"):
        open_source(spec)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [f"row {number}" for number in range(600)] + [None]
    parquet.write_table(pyarrow.table({"text": rows, "id": list(range(601))}), tmp_path / "x.parquet")
    got = read(tmp_path / "x.parquet")
    assert list(got.values()) == [*rows[:-1], ""]
    assert list(got)[-1] == "601"
    (tmp_path / "x.parquet").rename(tmp_path / "X.PARQUET")
    assert read(tmp_path / "X.PARQUET") == got
    (tmp_path / "X.PARQUET").rename(tmp_path / "x.parquet")
    with pytest.raises(DataError, match="no field 'texts', its fields are 'text', 'id'; did you mean 'text'"):
        read(f"{tmp_path}/x.parquet:texts")
    with pytest.raises(DataError, match="row 1: field 'id' is int"):
        read(f"{tmp_path}/x.parquet:id")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not a parquet file"):
        read(tmp_path / "broken.parquet")


def test_datasets_by_path(write, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    write("set/train.jsonl", '{"text": "one", "b": "1"}\n{"text": "two", "b": "2"}\n')
    assert list(read(f"hf:{tmp_path}/set").values()) == ["one", "two"]
    assert list(read(f"hf:{tmp_path}/set:b").values()) == ["1", "2"]
    identity = open_source(f"hf:{tmp_path}/set").identity()
    shutil.copytree(tmp_path / "set", tmp_path / "other@name:of")
    moved = open_source(f"hf:{tmp_path}/other@name:of")
    assert (moved.identity(), list(read(moved.spec))) == (identity, ["1", "2"])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("hf:~/set:b") == {"1": "1", "2": "2"}
    datasets.Dataset.from_dict({"text": ["three"]}).save_to_disk(str(tmp_path / "saved"))
    assert list(read(f"hf:{tmp_path}/saved").values()) == ["three"]
    with pytest.raises(DataError, match="row 1: no field 'c'"):
        read(f"hf:{tmp_path}/set:c")
    with pytest.raises(DataError, match="hf:.*nowhere"):
        read(f"hf:{tmp_path}/nowhere")


def test_damage_in_the_middle_of_records_says_where(write, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    words = [f"{number * 7919 % 1000003:x}" * 9 for number in range(6000)]
    parquet.write_table(pyarrow.table({"text": words}), tmp_path / "x.parquet", row_group_size=1000)
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20_000] = bytes(20_000)
    write("columns/x.parquet", content)
    lines = [json.dumps({"text": word}) for word in words]
    lines[4321] = lines[4321][:7]
    write("lines/train.jsonl", "\n".join(lines))
    write("lines/notes.jsonl", '{"about": "another thing"}')
    for spec, said in [
        ("columns/x.parquet", r"columns/x.parquet, row \d{4} or soon after: cannot be read"),
        ("columns", r"columns/x.parquet, row \d{4} or soon after: cannot be read"),
        ("lines/train.jsonl", "lines/train.jsonl, line 4322: not JSON"),
        ("hf:{}/columns", r"columns/x.parquet, row \d{4} or soon after: cannot be read"),
        ("hf:{}/lines", "lines/train.jsonl, line 4322: not JSON"),
    ]:
        spec = spec.format(tmp_path) if "{" in spec else f"{tmp_path}/{spec}"
        with pytest.raises(DataError, match=said) as caught:
            read(spec)
        assert "\n" not in str(caught.value)
