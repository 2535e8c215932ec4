"""README and docs do what they say: snippets run as they stand, and links, files, commands and names exist.

How a page is written, so that this can hold it to its word:

- Every snippet is fenced and says its language; a fence without one shows output. A page's snippets run from top to bottom,
  in one folder and, for Python, one namespace, as a reader would paste them.
- YAML is a run or a design; a first line `# NAME.yaml` also writes it to that file.
- `sh` lines begin with plait, python, make or pip. `plait` lines run here; `plait train` with QUICK added, and what works
  for minutes or asks (SLOW) with --help; a run that starts from a model keeps its length. Of `python FILE` the file and its
  options must exist, of `make TARGET` the target.
- `stdlib` is a small folder here, and `book.txt` a short book.
"""

import ast
import pkgutil
import re
import shlex
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.main import get_command

from plait.cli.app import app, run
from plait.design.layers import KINDS, LETTERS
from plait.design.load import load_design, read_yaml
from plait.train import RunConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
QUICK = ("steps=2", "batch=2", "data.length=16", "eval_tokens=64", "sample_every=0", "data.tokenizer=bytes")
SLOW = ("bench", "demo", "selfcheck", "doctor", "chat", "serve")
OPTION = re.compile(r"(?<!\S)--[a-z][\w-]*")


@dataclass(frozen=True)
class Block:
    """A fenced snippet; `line` is where its text begins."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    found, language, start, text = [], None, 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            if language is None:
                language, start, text = line[3:].strip(), number + 1, []
            else:
                found.append(Block(language, "\n".join(text) + "\n", start))
                language = None
        elif language is not None:
            text.append(line)
    assert language is None, f"{page}: a fence is not closed"
    return found


def prose(page: Path) -> str:
    """The page without what is fenced."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def spans(page: Path) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def lines(block: Block) -> list[list[str]]:
    """The words of each shell line."""
    return [words for line in block.text.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A reader's folder, in a process that comes back as it was."""
    from plait.layers.recurrent import CELLS
    from plait.layers.stack import LAYERS

    library = tmp_path / "library"
    library.mkdir()
    for number in range(12):
        (library / f"m{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 20, encoding="utf-8")
    (tmp_path / "book.txt").write_text("Once there was a number.\n" * 200, encoding="utf-8")
    found = sysconfig.get_path
    monkeypatch.setattr(
        sysconfig, "get_path", lambda name, *a, **k: str(library) if name == "stdlib" else found(name, *a, **k)
    )
    monkeypatch.chdir(tmp_path)
    tables = [(table, dict(table)) for table in (KINDS, LETTERS, LAYERS, CELLS)]
    yield tmp_path
    for table, before in tables:
        table.clear()
        table.update(before)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_snippets_run_from_top_to_bottom(page, reader):
    namespace = {"__name__": f"page_{page.stem}"}
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        if block.language == "python":
            if named := re.match(r"# (\w+)\.py\n", block.text):
                (reader / f"{named[1]}.py").write_text(block.text, encoding="utf-8")
                namespace["__name__"] = named[1]
            code = ast.increment_lineno(ast.parse(block.text, where), block.line - 1)
            exec(compile(code, where, "exec"), namespace)
        elif block.language == "yaml":
            read_design_or_run(block.text, reader)
        elif block.language == "sh":
            for words in lines(block):
                run_line(words, where)
        else:
            assert not block.language, f"{where}: what is {block.language}?"


def read_design_or_run(text: str, folder: Path) -> None:
    data = read_yaml(text)
    RunConfig.from_dict(data) if {"design", "start"} & data.keys() else load_design({"vocab": 257} | data)
    named = re.match(r"# ([\w-]+\.yaml)\n", text)
    if named:
        (folder / named[1]).write_text(text, encoding="utf-8")


def quickly(words: list[str]) -> list[str]:
    """A training command with QUICK in place of its own settings."""
    begun = any(word.startswith("start=") for word in words)
    quick = [change for change in QUICK if not (begun and change.startswith("data.length"))]
    keys = {change.partition("=")[0] for change in quick}
    return [*(word for word in words if word.partition("=")[0] not in keys), *quick]


def run_line(words: list[str], where: str) -> None:
    program, *rest = words
    if program == "plait":
        if rest[0] in SLOW:
            check_options("plait", rest, where)
        else:
            assert run(quickly(rest) if rest[0] == "train" else rest) == 0, f"{where}: {shlex.join(words)}"
    elif program == "python":
        check_options(rest[0], rest, where)
    elif program == "make":
        assert set(rest) <= targets(), f"{where}: {words}"
    else:
        assert program == "pip", f"{where}: {words}"


def targets() -> set[str]:
    return set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def check_options(program: str, words: list[str], where: str) -> None:
    """The options among `words` are some that `plait COMMAND`, or the script's own text, knows."""
    if program == "plait":
        command, rest = get_command(app), list(words)
        while rest and hasattr(command, "commands"):
            assert rest[0] in command.commands, f"{where}: plait {' '.join(words)}"
            command = command.commands[rest.pop(0)]
        known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    else:
        assert (ROOT / program).is_file(), f"{where}: {program}"
        known = set(re.findall(r'"(--[\w-]+)"', (ROOT / program).read_text(encoding="utf-8")))
    assert set(OPTION.findall(" ".join(words))) <= known, f"{where}: {words}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_command_stands_where_it_is_not_run(page):
    text = prose(page)
    assert not re.findall(r"^ {4,}(?:plait|python|make|pip) .*", text, re.MULTILINE), "indented; fence it as sh"
    for block in blocks(page):
        assert block.language or not re.match(r"(?:plait|python|make|pip|import|from) ", block.text), block


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", path):
            continue  # the web is not asked
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_what_is_named_exists(page):
    for span in spans(page):
        words = span.split()
        path = re.fullmatch(r"(?:plait|docs|tests|benchmarks|examples)/[\w/.-]+", words[0])
        name = re.match(r"plait(?:\.\w+)+", span)
        if path and not re.search(r"\b[A-Z]+\b", path[0]):  # plait/ops/NAME stands for any name
            assert (ROOT / path[0]).exists(), f"{page.name}: {span}"
        elif name and not path:
            assert exists(name[0]), f"{page.name}: {span}"
        elif words[0] == "plait" and len(words) > 1 and words[1].strip(",").isalpha():
            check_options("plait", [word.strip(",") for word in words[1:]], page.name)
        elif words[0] == "make" and len(words) == 2:
            assert words[1] in targets(), f"{page.name}: {span}"
        elif words[0] == "python" and len(words) > 1 and words[1].endswith(".py"):
            check_options(words[1], words[1:], page.name)


def exists(dotted: str) -> bool:
    """Whether a name such as plait.hub.register is a module, or something in one."""
    try:
        pkgutil.resolve_name(dotted)
    except (ImportError, AttributeError):
        return False
    return True


def test_the_pages_are_in_the_reading_order():
    order = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in order, page.name
