"""Files: UTF-8 whatever the locale, whole or not there, one mode for all, links kept, failures with a name."""

import ast
import os
import stat
from pathlib import Path

import pytest

import plait
from plait.files import letters, read_text, user_path, write_atomic, write_text

ROOT = Path(plait.__file__).parents[1]
PLACES = ("plait", "docs", "benchmarks", "examples")
TEXT_CALLS = {"open", "read_text", "write_text", "fdopen", "NamedTemporaryFile", "TemporaryFile", "TextIOWrapper"}


def without_encoding(source: str) -> list[int]:
    """Lines of calls that read or write text in whatever encoding the locale has."""
    lines = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        method = isinstance(call.func, ast.Attribute)
        name = call.func.attr if method else getattr(call.func, "id", "")
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        strings = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        text = getattr(given.get("text") or given.get("universal_newlines"), "value", None)
        if text is True and "encoding" not in given:
            lines.append(call.lineno)
        if name not in TEXT_CALLS or "encoding" in given or (method and name == "open" and owner(call) in OTHER_OPENS):
            continue
        mode = getattr(given.get("mode"), "value", None)
        binary = any("b" in word and len(word) <= 3 for word in [*strings, mode or ""])
        named = "utf-8" in strings or (not method and name in ("read_text", "write_text"))
        if not (binary or named or (name.endswith("TemporaryFile") and not strings and mode is None)):
            lines.append(call.lineno)
    return lines


OTHER_OPENS = {"os", "Checkpoint", "Shards"}


def owner(call: ast.Call) -> str:
    return getattr(call.func.value, "id", "")


def test_every_text_file_names_its_encoding():
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for place in PLACES
        for path in sorted((ROOT / place).rglob("*.py"))
        for line in without_encoding(path.read_text("utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "call",
    ["open(p)", "open(p, 'w')", "p.open()", "p.read_text()", "p.write_text('a')", "subprocess.run(c, text=True)"],
)
def test_the_search_for_encodings_finds(call):
    assert without_encoding(call) == [1]


@pytest.mark.parametrize("content", ["", "für 漢字\r\n\n", "a\ufeffb"])
def test_text_is_read_as_it_was_written_and_without_a_byte_order_mark(tmp_path, content):
    path = tmp_path / "a.txt"
    write_text(path, content)
    assert path.read_bytes() == content.encode()
    assert read_text(path) == content
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert read_text(path) == content


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"ab\xff", "byte 2 (0xff) is not UTF-8; expected UTF-8 text"),
        (b"\xef\xbb\xbfab\xff", "byte 5 (0xff) is not UTF-8; expected UTF-8 text"),
        ("f\u00fcr".encode("utf-16"), "UTF-16 text; expected UTF-8 text, save it as such"),
    ],
)
def test_other_encodings_are_named(tmp_path, content, said):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="UTF-8") as caught:
        read_text(path)
    assert str(caught.value) == f"{path}: {said}"


def test_paths_of_users(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/books/a.txt") == tmp_path / "books/a.txt"
    assert user_path(Path("~")) == tmp_path
    assert user_path("books/~a") == Path("books/~a")
    for wrong in ("", "a\0b", "~nobody-of-this-name/x"):
        with pytest.raises(ValueError, match="expected") as caught:
            user_path(wrong)
        assert "\n" not in str(caught.value)


def test_letters_are_the_same_in_the_c_locale(monkeypatch):
    """As Python reads names and arguments in the C locale without its UTF-8 mode: bytes in surrogates."""
    monkeypatch.setattr("os.fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    monkeypatch.setattr("os.fsdecode", lambda content: content.decode("ascii", "surrogateescape"))
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")
    system = "für".encode().decode("ascii", "surrogateescape")
    assert letters(system) == letters("für") == "für"
    assert str(user_path("für")) == str(user_path(system)) == system


@pytest.mark.skipif(os.name != "posix", reason="umask and links are POSIX's")
class TestOnPosix:
    @pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o027])
    def test_modes_are_the_umasks(self, tmp_path, umask):
        def replaced(path):  # a writer that puts a file of its own in place, as safetensors does
            path.unlink()
            path.write_bytes(b"a")
            path.chmod(0o600)

        before = os.umask(umask)
        try:
            (tmp_path / "plain").write_bytes(b"a")
            write_text(tmp_path / "new/text", "a")
            write_atomic(tmp_path / "replaced", replaced)
            (tmp_path / "old").touch(0o600)
            write_text(tmp_path / "old", "a")
        finally:
            os.umask(before)
        modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
        assert modes == {0o666 & ~umask}

    @pytest.mark.parametrize("there", [True, False])
    def test_a_link_stays_and_its_target_is_replaced(self, tmp_path, there):
        target, link = tmp_path / "disk/a.txt", tmp_path / "run/a.txt"
        target.parent.mkdir(), link.parent.mkdir()
        if there:
            target.write_text("old", encoding="utf-8")
        link.symlink_to("../disk/a.txt")
        write_text(link, "new")
        assert link.is_symlink()
        assert read_text(target) == "new"
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "a.txt", "disk", "run"]

    def test_a_device_is_written_to_and_never_replaced(self, tmp_path):
        pipe, seen = tmp_path / "pipe", []
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        try:
            write_text(pipe, "text")
            seen.append(os.read(reader, 100))
        finally:
            os.close(reader)
        assert seen == [b"text"]
        assert stat.S_ISFIFO(pipe.stat().st_mode)


class Full(Exception):
    """As libraries in Rust say it."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(28, "No space left on device"), OSError),
        (Full("Error while serializing: I/O error: No space left on device (os error 28)"), OSError),
        (OSError(28, "No space left on device", "elsewhere"), OSError),
        (ValueError("no such thing"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_what_fails_names_the_file_and_leaves_the_old_one(tmp_path, error, kind):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(temporary):
        temporary.write_bytes(b"half")
        raise error

    with pytest.raises(kind) as caught:
        write_atomic(path, fail)
    if kind is OSError:
        assert (caught.value.errno, caught.value.strerror) == (28, "No space left on device")
        assert caught.value.filename == (getattr(error, "filename", None) or str(path))
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert read_text(path) == "old"


def test_a_folder_that_cannot_be_written_is_named_by_the_file(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(PermissionError) as caught:
        write_text(tmp_path / "a.txt", "a")
    assert caught.value.filename == str(tmp_path / "a.txt")
