"""Write docs/reference.md from the docstrings and defaults of the configs: `make docs`."""

import inspect
import json
import re
from pathlib import Path
from pkgutil import resolve_name

from plait.convert import Conversion
from plait.design import ModelConfig, RoPE, Temperature, Wrap, load_design
from plait.design.count import parameters
from plait.design.ends import FRONT_KINDS, HEAD_KINDS
from plait.design.layers import KINDS, LETTERS
from plait.design.layers.recurrent import NonlinearRecurrence
from plait.design.layers.rope import SCALINGS
from plait.design.lora import LoRA
from plait.design.merges import MERGE_KINDS
from plait.design.norms import NORM_KINDS
from plait.design.presets import OWN
from plait.design.summary import si
from plait.train.config import DataConfig, RunConfig

HERE = Path(__file__).parent
# What a program calls, in the order in which it meets them.
FUNCTIONS = (
    "plait.build",
    "plait.load",
    "plait.save",
    "plait.load_tokenizer",
    "plait.generate",
    "plait.engine.stream",
    "plait.engine.Chat",
    "plait.engine.Chat.say",
    "plait.LanguageModel.forward",
    "plait.LanguageModel.features",
    "plait.LanguageModel.run",
    "plait.LanguageModel.place",
    "plait.Channels",
    "plait.listening",
    "plait.checking",
    "plait.swap",
    "plait.ModelConfig.places",
    "plait.model.head.Head.loss",
    "plait.model.Loss",
    "plait.model.Objective",
    "plait.model.Distillation",
    "plait.LanguageModel.init_state",
    "plait.LanguageModel.state_spec",
    "plait.ModelState.fork",
    "plait.ModelState.select",
    "plait.ModelState.detach",
    "plait.ModelState.to",
    "plait.ModelState.save",
    "plait.ModelState.load",
    "plait.train.train",
    "plait.train.load_run",
    "plait.train.Result",
    "plait.convert.Plan",
    "plait.convert.student_of",
    "plait.convert.Stages",
    "plait.convert.Alignment",
    "plait.register",
    "plait.hub.register",
    "plait.load_design",
)


def defaults_of(cls: type) -> dict:
    return dict(zip(cls.__struct_fields__[::-1], cls.__struct_defaults__[::-1], strict=False))


def describe(name: str, cls: type, base: type | None = None) -> list[str]:
    """A heading, the docstring, and the fields with their defaults; after `base`, those that differ."""
    defaults, told = defaults_of(cls), defaults_of(base) if base else {}
    lines = [f"### `{name}`", "", "```", inspect.cleandoc(cls.__doc__ or ""), "```", ""]
    fields = []
    for field in cls.__struct_fields__:
        if field in told and told[field] == defaults[field]:
            continue
        shown = repr(defaults.get(field)).replace("<factory>", "{}")
        fields.append(f"`{field}` {'= ' + shown if field in defaults else '(required)'}")
    return [*lines, ", ".join([f"those of {base.__name__}", *fields] if base else fields), ""]


def describe_call(name: str) -> list[str]:
    """A heading, how it is called, and the docstring."""
    thing = resolve_name(name)
    called = re.sub(r"\b(?!torch\b)(?:[a-z_]\w*\.)+(?=[A-Za-z])|~", "", str(inspect.signature(thing)))  # no modules
    called = re.sub(r"^\((?:self|cls)(?:, |(?=\)))", "(", called)
    return [f"### `{name}`", "", "```", name.rpartition(".")[2] + called, "", inspect.getdoc(thing) or "", "```", ""]


def main() -> None:
    lines = ["# Reference", "", "Written by `make docs` from the code. Values left out have the defaults shown.", ""]
    lines += [
        "## Designs",
        "",
        *describe("ModelConfig", ModelConfig),
        *describe("wrap", Wrap),
        *describe("rope", RoPE),
    ]
    for kind, scaling in SCALINGS.items():
        lines += describe(f"rope.scaling, kind: {kind}", scaling)
    lines += describe("temperature", Temperature)
    lines += [
        "## Layers",
        "",
        "Default letters: " + ", ".join(f"`{k}` {type(v).__name__}" for k, v in LETTERS.items()) + ".",
        "",
    ]
    for kind, cls in KINDS.items():
        base = NonlinearRecurrence if issubclass(cls, NonlinearRecurrence) else None
        if base and not any(line.startswith("### `NonlinearRecurrence") for line in lines):
            lines += describe("NonlinearRecurrence, what the next have in common", NonlinearRecurrence)
        lines += describe(f"{cls.__name__}, kind: {kind}", cls, base)
    tables = {"Merges": MERGE_KINDS, "Norms": NORM_KINDS, "Fronts": FRONT_KINDS, "Heads": HEAD_KINDS}
    for title, kinds in tables.items():
        lines += [f"## {title}", ""]
        for kind, cls in kinds.items():
            lines += describe(f"{cls.__name__}, kind: {kind}", cls)
    lines += [
        "## Presets",
        "",
        "Published models too: [presets](presets.md).",
        "",
        "| name | parameters | design |",
        "|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {si(parameters(load_design(name)))} | `{json.dumps(data)}` |" for name, data in OWN.items()
    ]
    lines += [
        "",
        "## Runs",
        "",
        *describe("run.yaml", RunConfig),
        *describe("data", DataConfig),
        *describe("lora", LoRA),
        "## Conversions",
        "",
        *describe("convert.yaml", Conversion),
    ]
    lines += ["## Functions", ""]
    for name in FUNCTIONS:
        lines += describe_call(name)
    (HERE / "reference.md").write_text("\n".join(lines), encoding="utf-8")
    print(f"wrote {HERE / 'reference.md'}")


if __name__ == "__main__":
    main()
