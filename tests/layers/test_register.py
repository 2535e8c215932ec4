"""Cells of one's own: one call makes a letter, and what the solvers could not work with is refused with its reason."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import plait
from plait.design.layers import KINDS, LETTERS
from plait.evaluate.laws import LAWS, small
from plait.layers.recurrent import CELLS
from plait.layers.stack import LAYERS


@pytest.fixture(autouse=True)
def restored():
    tables = [(table, dict(table)) for table in (KINDS, LETTERS, LAYERS, CELLS)]
    yield
    for table, before in tables:
        table.clear()
        table.update(before)


@dataclass(frozen=True)
class Leaky(plait.Cell):
    """h = f h + (1 - f) tanh(a x), with an extra weight and a state of its own that starts at 1."""

    slope: float = 1.0

    inputs = ("f", "z")
    states = ("h", "trace")
    weights = ("p",)
    keeps = ("f", 1)

    @property
    def start(self):
        return 0.0, 1.0

    def step(self, x, m, s, w):
        f = torch.sigmoid(x[0] + m[0] + w[0] * s[1])
        trace = f * s[1]
        return s[0] * f + (1 - f) * torch.tanh(self.slope * x[1] + m[1]), trace


def test_a_letter_in_one_call():
    config = plait.register("Z", Leaky, gate_bias=(1.0, 2.0), heads=4)
    assert config.__name__ == "Leaky" and config.__doc__ == Leaky.__doc__
    design = plait.ModelConfig(vocab=7, dim=64, pattern="ZF [Z|A]F", layers={"A": plait.Attention(heads=2)})
    assert design.place("Z#0").layer.gate_bias == (1.0, 2.0)
    assert plait.ModelConfig.from_dict(design.to_dict()) == design
    bound = design.replace(layers={"Z": config(slope=2.0, recurrence="heads", heads=2)})
    assert bound.to_dict()["layers"]["Z"] == {"kind": "leaky", "slope": 2.0, "recurrence": "heads", "heads": 2}
    assert plait.load_design(bound.to_dict()) == bound
    with pytest.raises(ValueError, match=r"unknown key 'slop'; did you mean 'slope'"):
        plait.load_design({"vocab": 7, "dim": 64, "pattern": "Z", "layers": {"Z": {"kind": "leaky", "slop": 1.0}}})
    state = plait.build(design).init_state(2)
    assert state.slots[0].s.shape == (2, 2, 4, 16)
    assert state.slots[0].s[:, 1].eq(1).all() and state.slots[0].s[:, 0].eq(0).all()


@pytest.mark.parametrize("recurrence", ["diagonal", "heads"])
@pytest.mark.parametrize("law", ["causal", "split", "packed", "fast", "spec", "counts"])
def test_it_keeps_the_laws(law, recurrence):
    config = plait.register("Z", Leaky)
    LAWS[law](small("ZF", Z=config(heads=2, head_dim=6, recurrence=recurrence)), "cpu", torch.float64)


def test_again():
    """The same class may come again, with another letter too; a class of the same place replaces the one before."""
    config = plait.register("Z", Leaky)
    assert plait.register("Zed", Leaky, slope=3.0) is config
    assert LETTERS["Zed"].slope == 3.0 and LETTERS["Z"].slope == 1.0

    def define(add):
        @dataclass(frozen=True)
        class Mine(plait.Cell):
            def step(self, x, m, s, w):
                return (torch.tanh(x[0] + m[0]) + add,)

        plait.register("Y", Mine)
        model = plait.build(plait.ModelConfig(vocab=3, dim=64, pattern="Y"))
        return model, model(torch.zeros(1, 5, dtype=torch.long))[0]

    model, first = define(0.0)
    _, second = define(1.0)
    assert not torch.equal(first, second)
    assert torch.equal(model(torch.zeros(1, 5, dtype=torch.long))[0], first)


def page(name):
    text = (Path(__file__).parents[2] / "docs" / name).read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    names = {"__name__": __name__}
    exec(code, names)
    return code, names


@pytest.mark.parametrize("law", [law for law in LAWS if law not in ("compiled", "solver")])
def test_the_layer_of_the_documentation_keeps_the_laws(law):
    code, names = page("add-a-layer.md")
    assert len(code.splitlines()) <= 60
    assert names["model"](torch.arange(20)[None])[0].isfinite().all()
    LAWS[law](small("ZF [Z|A]", Z=names["Fading"](heads=2)), "cpu", torch.float64)


def test_layers_are_known_by_kind_and_module():
    _, names = page("add-a-layer.md")
    fading, module = names["Fading"], names["FadingLayer"]
    design = plait.ModelConfig(vocab=7, dim=64, pattern="ZF", at={"Z#0": {"heads": 4}})
    assert plait.ModelConfig.from_dict(design.to_dict()) == design
    assert plait.register("Zed", fading, module, heads=2) is fading
    with pytest.raises(TypeError, match="Fading needs its module"):
        plait.register("Z", fading)
    with pytest.raises(ValueError, match="letter 'A' is Attention already"):
        plait.register("A", fading, module)
    other = type("Other", (plait.Layer,), {"__module__": __name__}, tag="fading", frozen=True, kw_only=True)
    with pytest.raises(ValueError, match="kind 'fading' exists already"):
        plait.register("Y", other, module)


def test_the_page_of_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "add-a-cell.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    names = {"__name__": __name__}
    exec(code, names)
    logits, _ = names["model"](torch.arange(20)[None])
    assert logits.isfinite().all()
    assert plait.build(names["other"]).design.place("Z#0").layer.slope == 2.0


def cell(step, **names):
    return dataclass(frozen=True)(type("Odd", (plait.Cell,), {"step": step, "__module__": __name__, **names}))


class Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, dy):
        return dy


WRONG = {
    "returns a tensor": (lambda self, x, m, s, w: x[0], "must return a tuple of its states \\('h',\\), got a Tensor"),
    "returns too many": (lambda self, x, m, s, w: (x[0], x[0]), "got 2 values"),
    "mixes units": (lambda self, x, m, s, w: (torch.softmax(x[0] + m[0], -1),), "mixes units"),
    "mixes rows": (lambda self, x, m, s, w: (torch.tanh(x[0] + m[0] - s[0].mean(0)),), "mixes rows"),
    "another shape": (lambda self, x, m, s, w: (x[0][..., :1],), "must keep shape and dtype"),
    "another dtype": (lambda self, x, m, s, w: (x[0].float(),), "must keep shape and dtype"),
    "not finite": (lambda self, x, m, s, w: (torch.log(x[0] + m[0]),), "not finite"),
    "writes in place": (lambda self, x, m, s, w: (x[0].add_(m[0]),), "writes into its arguments"),
    "jumps": (lambda self, x, m, s, w: (torch.where(x[0] + m[0] > 0, 1.0, -1.0) * s[0],), "jumps"),
    "jumps at a threshold": (lambda self, x, m, s, w: (F.threshold(x[0] + m[0], 1.0, 0.0),), "jumps"),
    "no derivative": (lambda self, x, m, s, w: (torch.tanh(x[0] + m[0].detach()),), "autograd's derivatives"),
    "none at all": (lambda self, x, m, s, w: (torch.tanh((x[0] + m[0]).detach()),), "derivatives"),
    "wrong derivative": (lambda self, x, m, s, w: (Frozen.apply(x[0] + m[0]),), "autograd's derivatives"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_step_that_solvers_could_not_use(what):
    step, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        plait.register("Z", cell(step))
    assert "Z" not in LETTERS and "odd" not in KINDS


def fine(self, x, m, s, w):
    return (torch.relu(x[0] + m[0]) + 0.5 * s[0],)


def test_names():
    plait.register("Z", cell(fine))
    for letter, kind, message in (
        ("G", cell(fine), "letter 'G' is GRU already"),
        ("z", cell(fine), "a letter is a capital"),
        ("Zz", dataclass(frozen=True)(type("GRU", (plait.Cell,), {"step": fine})), "kind 'gru' exists already"),
        ("Zz", cell(fine, __qualname__="elsewhere.Odd"), "kind 'odd' exists already"),
        ("Z", Leaky, "letter 'Z' is Odd already"),
        ("Zz", cell(fine, __qualname__="Odd", start=(0.0, 0.0)), "start has 2 numbers"),
        ("Zz", cell(fine, keeps=("g", 1)), "keeps must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            plait.register(letter, kind)
    for wrong, message in (
        (torch.nn.GRU, "subclass of plait.Cell, got GRU"),
        (type("Bare", (plait.Cell,), {"step": fine}), "dataclass"),
        (cell(fine, __annotations__={"clip": float}, clip=1.0), "every recurrent layer has already"),
        (cell(fine, __annotations__={"weights": tuple}, weights=()), "became a field"),
    ):
        with pytest.raises(TypeError, match=message):
            plait.register("Zz", wrong)
    with pytest.raises(ValueError, match="unknown key 'hedas'; did you mean 'heads'"):
        plait.register("Zz", Leaky, hedas=3)
    assert "Zz" not in LETTERS


def test_a_cell_is_looked_at_whatever_the_default_device_is():
    with torch.device("meta"):
        assert plait.register("Z", Leaky).__name__ == "Leaky"
