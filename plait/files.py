"""Files in UTF-8, either the old one or the whole new one, whatever happens in between; and what a user means by a path."""

import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OTHER_UNICODE = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def user_path(spec: str | os.PathLike[str]) -> Path:
    """The path that a user gave: `~` and `~name` are home folders, and a name's letters are UTF-8 in any locale."""
    text = os.fspath(spec)
    if not text or "\0" in text:
        raise ValueError(f"path {text!r}: expected a file's or folder's name")
    if sys.getfilesystemencoding() != "utf-8" and not text.isascii():  # the C locale: bytes are smuggled in surrogates
        text = os.fsdecode(text.encode("utf-8", "surrogateescape"))
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"path {text!r}: no such user; expected ~/ for your own home folder") from None


def letters(text: str) -> str:
    """What the system gave, a file's name or an argument, in the letters of its UTF-8, whatever the locale made of it."""
    try:
        return os.fsencode(text).decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # not from the system
        return text


def read_text(path: Path) -> str:
    """A text file, which is UTF-8 whatever the locale says; a byte order mark at its head is no part of it."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        rest = error.object  # without a byte order mark
        raise ValueError(f"{path}: {not_utf8(rest, error.start, len(content) - len(rest))}") from None


def not_utf8(head: bytes, at: int, offset: int = 0) -> str:
    """What is wrong at `head[at]`, in the words of all readers; `offset`: where in the file `head` begins."""
    other = OTHER_UNICODE.get(head[:2]) if offset == 0 else None
    content = f"{other} text" if other else f"byte {offset + at} (0x{head[at]:02x}) is not UTF-8"
    return f"{content}; expected UTF-8 text{', save it as such' if other else ''}"


def json_text(data: Any, **how: Any) -> str:
    """JSON, which has no NaN and no infinity: null."""
    return json.dumps(_finite(data), allow_nan=False, **how)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def write_text(path: Path, text: str) -> None:
    """`write_atomic` for text, in UTF-8 and with its line ends as they are."""
    write_atomic(path, lambda temporary: _write(temporary, text))


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, force it to disk, then put it in place.

    A link stays, and what it points to is replaced. The file's mode is the one that the umask gives to any new file.
    """
    target = Path(os.path.realpath(path))
    with naming(path, within=target.parent):
        if path.exists() and not (path.is_file() or path.is_dir()):
            _write_into(path, write)
            return
        path = target
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
            os.close(descriptor)
            write(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(mode)  # `write` may have made a file of its own
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _write_into(device: Path, write: Callable[[Path], object]) -> None:
    """A device or a pipe is written to, never replaced, and `write` may replace what it is given."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "content"))
        with open(Path(folder, "content"), "rb") as content, open(device, "wb") as file:
            shutil.copyfileobj(content, file)


@contextmanager
def naming(path: Path, within: Path) -> Iterator[None]:
    """Failures of the system while `path` is written name `path`, where they name nothing or a file of the moment
    `within` a folder."""
    try:
        yield
    except OSError as error:
        other = error.filename is not None and not Path(os.fsdecode(error.filename)).is_relative_to(within)
        if error.errno is None or other:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    except Exception as error:
        code = re.search(r"\(os error (\d+)\)", str(error))  # safetensors' and tokenizers' way to say errno
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk, so that a rename survives a power cut, where the system lets a folder be synced."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
