"""YAML 1.2's core schema over PyYAML, which by itself reads and writes 1.1: 010 is ten, 3e-4 a number, 1:30, yes and
2024-01-01 are text, and a key given twice is an error."""

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError, SafeConstructor
from yaml.nodes import MappingNode, ScalarNode

TAG = "tag:yaml.org,2002:"
PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
# YAML 1.2.2, section 10.3.2, with the characters that each begins with; and 1.1's merge key, which files in the wild use
RESOLVE = {
    "null": (r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    "int": (r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    "float": (
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
    "merge": (r"<<$", ["<"]),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}
    yaml_constructors = {
        **{TAG + name: SafeConstructor.yaml_constructors[TAG + name] for name in PLAIN},
        None: SafeConstructor.yaml_constructors[None],  # any other tag: an error
    }

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, ScalarNode):
                known, line = (key.tag, key.value), key.start_mark.line + 1
                if known in lines:
                    raise ConstructorError(
                        problem=f"{key.value!r} is given twice, first in line {lines[known]}",
                        problem_mark=key.start_mark,
                    )
                lines[known] = line
        return node

    def plain_int(self, node: Any) -> int:
        text = self.construct_scalar(node)
        try:
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        except ValueError:  # a number of thousands of digits, or text that is tagged as one
            raise ConstructorError(problem=f"{text[:20]!r} is no number", problem_mark=node.start_mark) from None


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would take for something else."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def text(self, data: str) -> Any:
        return self.represent_scalar(TAG + "str", data, style=None if data.isprintable() else '"')


_Loader.add_constructor(TAG + "int", _Loader.plain_int)
_Dumper.add_representer(str, _Dumper.text)
for name, (pattern, first) in RESOLVE.items():
    for kind in (_Loader, _Dumper):
        kind.add_implicit_resolver(TAG + name, re.compile(pattern), first)


def read_yaml(text: str) -> Any:
    """Plain data from YAML text. Raises ValueError with the line and what is wrong there."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"line {line}: character U+{ord(text[error.position]):04X} is no text") from None
    except RecursionError:
        raise ValueError("brackets nested too deeply to read") from None


def write_yaml(data: Any) -> str:
    """Text that `read_yaml` reads back."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
