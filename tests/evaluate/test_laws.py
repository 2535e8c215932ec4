"""The laws catch what they are there to catch: each mistake here was once somebody's bug."""

from contextlib import nullcontext

import pytest
import torch

import plait
from plait.engine.step import Step
from plait.evaluate.laws import DESIGNS, LAWS, LawBroken, graphs, small
from plait.evaluate.laws.compare import TOLERANCES, agree
from plait.evaluate.laws.models import input_dtypes, under_autocast
from plait.evaluate.selfcheck import selfcheck
from plait.layers import attention as attention_layer
from plait.layers import gated_deltanet, mamba, mamba2, recurrent, rg_lru, short_conv
from plait.layers.merges import GatedMerge
from plait.layers.norm import Norm
from plait.ops import graph
from plait.state import Buffer, ModelState


def unreset(op):
    """An op that runs over packed documents as if they were one."""

    def run(*args, packing=None, state=None, **rest):
        if packing is None:
            return op(*args, packing=packing, state=state, **rest)
        y, final = op(*args, state=None if state is None else state[:1], **rest)
        return y, None if state is None else final.expand_as(state)

    return run


def forgets_its_state(op):
    return lambda *args, state=None, **rest: op(*args, state=None if state is None else torch.zeros_like(state), **rest)


def sees_the_future(op):
    return lambda q, k, v, **rest: (
        op(q, k, v, **rest) + 1e-2 * v.mean(1, keepdim=True).repeat_interleave(q.shape[2] // v.shape[2], 2)
    )


def one_token_late(op):
    return lambda q, k, v, *, q_start=0, **rest: op(q, k, v, q_start=q_start, **rest) * (1 + 1e-3 * (q.shape[1] == 1))


def unreset_cells(op):
    def run(cell, x, *, packing=None, state=None, **rest):
        h, final, info = op(cell, x, state=state[:1] if packing and state is not None else state, **rest)
        return h, final if final is None else final.expand_as(state), info

    return run


def one_pass(op):
    """A solver that trusts its first guess."""
    return lambda cell, x, **rest: op(cell, x, **rest | {"tol": 1e3})


MISTAKES = {
    "a convolution that packing does not reset": ("packed", "DF", short_conv, "causal_conv", unreset),
    "a recurrence that packing does not reset": ("packed", "MF", mamba2, "ssd", unreset),
    "the same, through padding": ("padded", "DF", gated_deltanet, "gated_delta", unreset),
    "a convolution that starts each call from nothing": ("split", "MF", short_conv, "causal_conv", forgets_its_state),
    "a recurrence that starts each call from nothing": (
        "split",
        "DF",
        gated_deltanet,
        "gated_delta",
        forgets_its_state,
    ),
    "an elementwise recurrence that packing does not reset": ("packed", "RF", rg_lru, "scan", unreset),
    "a selective scan that starts each call from nothing": (
        "split",
        "MaF",
        mamba,
        "selective_scan",
        forgets_its_state,
    ),
    "attention that sees the future": ("causal", "AF", attention_layer, "attention", sees_the_future),
    "cells that packing does not reset": ("packed", "SF", recurrent, "shooting", unreset_cells),
    "a solver that stops too soon": ("fast", "HF peepholes, dense", recurrent, "shooting", one_pass),
    "a decoding path of its own": ("split", "AF", attention_layer, "attention", one_token_late),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mistakes_in_ops(mistake, dtype, monkeypatch):
    law, name, module, function, change = mistake
    monkeypatch.setattr(module, function, change(getattr(module, function)))
    with pytest.raises(LawBroken, match=f"^{law}: "):
        LAWS[law](DESIGNS[name], "cpu", dtype)


class Narrow(torch.autograd.Function):
    """Its gradient is of another dtype than its input."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return (dy * 2).bfloat16()


def test_a_gradient_of_another_dtype():
    x = torch.ones(3, requires_grad=True)
    output = Narrow.apply(x).sum()
    match = "NarrowBackward: a gradient is torch.bfloat16, its input torch.float32"
    with input_dtypes("compiled"), pytest.raises(LawBroken, match=match):
        output.backward()


@pytest.mark.parametrize("name", ["DF", "MF"])
def test_products_of_a_gradient_that_autocast_narrows(name, monkeypatch):
    monkeypatch.setattr(graph, "full_precision", lambda device: nullcontext())
    model = plait.build(DESIGNS[name])
    with pytest.raises((LawBroken, RuntimeError), match="dtype"):
        under_autocast("compiled", model, model, torch.arange(70)[None] % 61)


def test_a_stale_handle_that_does_not_raise(monkeypatch):
    monkeypatch.setattr(Buffer, "holds", lambda *args: True)
    with pytest.raises(LawBroken, match="without an error"):
        LAWS["rollback"](DESIGNS["AF"], "cpu", torch.float64)


def test_a_state_that_starts_from_zeros(monkeypatch):
    monkeypatch.setattr(plait.SLSTM, "start", lambda self: ())
    with pytest.raises(LawBroken, match="^split: no state"):
        LAWS["split"](DESIGNS["SF"], "cpu", torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decoding_step_with_a_product_of_its_own(dtype, monkeypatch):
    """As a kernel would be that is wrong for a row of its own."""
    wrong = Step.choose
    monkeypatch.setattr(Step, "choose", lambda self, hidden, at: wrong(self, hidden.roll(1, -1), at))
    with pytest.raises(LawBroken, match="^greedy: 1 rows"):
        LAWS["greedy"](DESIGNS["DF"], "cpu", dtype)


@pytest.mark.parametrize("name", ["fork", "to"])
def test_a_copy_that_shares_memory(name, monkeypatch):
    monkeypatch.setattr(ModelState, name, lambda self, *device: self)
    with pytest.raises(LawBroken, match="^fork: "):
        LAWS["fork"](DESIGNS["AF"], "cpu", torch.float64)


def test_states_of_any_design_taken(monkeypatch):
    monkeypatch.setattr(plait.LanguageModel, "_check_state", lambda *args: None)
    with pytest.raises(LawBroken, match="a model of another vocabulary took the state"):
        LAWS["fork"](DESIGNS["MF"], "cpu", torch.float64)


def test_a_parameter_nobody_counted(monkeypatch):
    def with_more(self, width, config, original=Norm.__init__):
        original(self, width, config)
        self.more = torch.nn.Parameter(torch.zeros(1))

    monkeypatch.setattr(Norm, "__init__", with_more)
    with pytest.raises(LawBroken, match="^counts: parameters of A#0"):
        LAWS["counts"](DESIGNS["AF"], "cpu", torch.float32)


def test_a_product_nobody_counted(monkeypatch):
    def twice(self, u, branches, original=GatedMerge.forward):
        return (original(self, u, branches) + original(self, u, branches)) / 2

    monkeypatch.setattr(GatedMerge, "forward", twice)
    with pytest.raises(LawBroken, match="^counts: FLOPs"):
        LAWS["counts"](DESIGNS["[MF|A]:gated F"], "cpu", torch.float32)


class TestAgree:
    def test_measures_the_largest_relative_error(self):
        want = {"a": torch.tensor([2.0, 0.0]), "b": torch.tensor([1.0])}
        got = {"a": torch.tensor([2.0, 1e-5]), "b": torch.tensor([1.0])}
        assert agree("law", "what", got, want) == pytest.approx(5e-6)

    @pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1.1])
    def test_breaks(self, wrong):
        with pytest.raises(LawBroken, match="law: what, a") as broken:
            agree("law", "what", {"a": torch.tensor([wrong])}, {"a": torch.tensor([1.0])})
        assert broken.value.tolerance == TOLERANCES[torch.float32][0]
        assert broken.value.error > 0.09

    def test_what_is_missing_breaks(self):
        with pytest.raises(LawBroken, match="in one of the two only"):
            agree("law", "what", {}, {"a": torch.zeros(1)})
        with pytest.raises(LawBroken, match="shape"):
            agree("law", "what", {"a": torch.zeros(2)}, {"a": torch.zeros(1)})

    def test_exactly(self):
        with pytest.raises(LawBroken):
            agree("law", "what", {"a": torch.tensor([1 + 2**-20])}, {"a": torch.tensor([1.0])}, exactly=True)


class TestSelfcheck:
    def test_results(self):
        seen = []
        laws = ["causal", "spec"]
        results = selfcheck("cpu", patterns=["AF", "[M|D]:gated"], laws=laws, progress=lambda *x: seen.append(x))
        assert [result for _, _, result in seen] == results
        assert [(done, total) for done, total, _ in seen] == [(n, 8) for n in range(1, 9)]
        assert all(result.passed and not result.message for result in results)
        assert {result.pattern for result in results} == {"AF", "[M|D]:gated"}
        assert {result.tolerance for result in results if result.law == "spec"} == {0.0}

    def test_in_processes_and_on_random_designs(self):
        call = {"dtypes": ["float64"], "patterns": ["AF"], "laws": ["spec", "causal"], "random": 1}
        alone, shared = (
            [(r.law, r.pattern, r.layers, r.passed) for r in selfcheck("cpu", **call, jobs=jobs)] for jobs in (1, 2)
        )
        assert alone == shared and len(alone) == 4 and all(passed for *_, passed in alone)

    def test_a_design_of_the_users(self):
        design = small("DA", D=plait.GatedDeltaNet(heads=1, head_dim=16))
        (result,) = selfcheck("cpu", ["float32"], [design], ["split"])
        assert result.passed
        assert result.pattern == "DA"

    def test_what_breaks_is_a_result(self, monkeypatch):
        def crash(*args, **rest):
            raise RuntimeError("no kernel image\nis available")

        monkeypatch.setattr(mamba2, "ssd", crash)
        broken, fine = selfcheck("cpu", ["float32"], ["MF", "AF"], ["causal"])
        assert not broken.passed
        assert broken.message == "causal: RuntimeError: no kernel image is available"
        assert fine.passed

    def test_precision_is_put_back(self):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            selfcheck("cpu", ["float32"], ["AF"], ["spec"])
            assert torch.get_float32_matmul_precision() == "high"
        finally:
            torch.set_float32_matmul_precision(before)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            ({"laws": ["casual"]}, "law 'casual' does not exist; did you mean 'causal'"),
            ({"dtypes": ["float23"]}, "dtype 'float23' cannot be checked; did you mean 'float32'"),
            ({"patterns": ["(AF"]}, "column 4: missing"),
            ({"device": "gpu"}, "device 'gpu': "),
        ],
    )
    def test_refusals(self, call, message):
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            selfcheck(**{"device": "cpu"} | call)


def test_decoding_in_reserved_room_is_two_graphs_too():
    tokens = torch.arange(30)[None] % 61
    graphs.decoding("compiled", plait.build(DESIGNS["AF"], dtype=torch.float64), tokens, "eager", room=32)
