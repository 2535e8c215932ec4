"""Experts: every form is the definition, a token's result is its own, and routing is what the papers say."""

import pytest
import torch
import torch.nn.functional as F

from plait.ops.kernels import Call, explain, forced
from plait.ops.moe import KERNELS, aligned, experts, grouped
from plait.ops.moe.routing import balance, load, route
from tests.ops.conftest import forms, run_with_gradients

EXPERTS, K, DIM, HIDDEN, OUT = 6, 2, 16, 24, 8


def problem(n, chosen=None, dtype=torch.float64, b=2, gated=True):
    torch.manual_seed(n)
    index = torch.rand(b, n, EXPERTS).topk(K, -1).indices if chosen is None else torch.tensor(chosen).expand(b, n, K)
    weights, index = torch.rand(b, n, K, dtype=dtype), index.contiguous()
    shapes = {"x": (b, n, DIM), "up": (EXPERTS, (1 + gated) * HIDDEN, DIM), "down": (EXPERTS, OUT, HIDDEN)}
    tensors = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()} | {"weights": weights}
    return tensors, lambda **x: (experts(x["x"], x["up"], x["down"], index, x["weights"], gated), None)


CHOSEN = {"some": None, "two of them": (4, 1), "the last": (5, 0)}


@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
@pytest.mark.parametrize("n", [1, 2, 3, 16, 40])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "relu2"])
def test_every_form_is_the_definition(gated, n, chosen, close):
    tensors, op = problem(n, chosen, gated=gated)
    *fast, reference = forms(KERNELS, n)
    assert fast == ["loop", "few"][: 2 if n <= 16 else 1]
    with forced(reference):
        want = run_with_gradients(op, tensors)
    for form in fast:
        with forced(f"moe={form}"):
            got = run_with_gradients(op, tensors)
        for name, x in want.items():
            close(got[name], x)


@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "relu2"])
def test_torchs_product_of_groups_is_the_definition(gated, chosen, close):
    """In float32, which torch multiplies group by group on a CPU: the same tokens in the same groups."""
    tensors, _ = problem(40, chosen, torch.float32, b=1, gated=gated)
    index = torch.rand(1, 40, EXPERTS).topk(K, -1).indices if chosen is None else torch.tensor(chosen).expand(1, 40, K)

    def by_groups(x, up, down, weights):
        return grouped.run(x[0], up, down, index[0], weights[0], gated)[None], None

    def by_definition(**x):
        return experts(x["x"], x["up"], x["down"], index, x["weights"], gated), None

    close.tolerance = 1e-5  # float32
    got = run_with_gradients(by_groups, tensors)
    with forced("reference"):
        for name, x in run_with_gradients(by_definition, tensors).items():
            close(got[name], x)


def test_a_token_s_result_is_its_own(close):
    """Whoever else its experts read."""
    tensors, op = problem(40)
    index = torch.rand(1, 40, EXPERTS).topk(K, -1).indices
    x, up, down, weights = (tensors[name] for name in ("x", "up", "down", "weights"))
    y = experts(x[:1], up, down, index, weights[:1])
    for t in (0, 7, 39):
        close(experts(x[:1, t:], up, down, index[:, t:], weights[:1, t:])[:, 0], y[:, t])
        close(experts(x[:1, t : t + 1], up, down, index[:, t : t + 1], weights[:1, t : t + 1])[:, 0], y[:, t])


def test_products_are_in_the_dtype_of_autocast():
    tensors, op = problem(20, dtype=torch.float32)
    want, _ = op(**tensors)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = op(**tensors)
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() <= 0.05 * want.abs().max()  # a few roundings of 2^-9


def call(device, tokens, dtype=torch.bfloat16, gradients=False, architecture=(9, 0), sizes=8):
    return Call(device, dtype, tokens, gradients, sizes=sizes, architecture=architecture if device == "cuda" else None)


def test_no_step_on_a_device_waits_for_it():
    def used(call):
        return next(name for name, reason in explain(KERNELS, call) if reason == "used")

    assert used(call("cpu", "one", torch.float32)) == "loop"
    assert used(call("cuda", "one")) == used(call("cuda", "many", gradients=True)) == "grouped"
    for other in ({"architecture": (8, 0)}, {"dtype": torch.float32}, {"sizes": aligned(64, 132)}):
        assert used(call("cuda", "one", **other)) == "few"
        assert used(call("cuda", "many", gradients=True, **other)) == "loop"


def test_routing_as_mixtral_says_it(close):
    logits = torch.randn(30, EXPERTS, dtype=torch.float64)
    index, weights = route(logits.softmax(-1), K)
    best, place = logits.topk(K, -1)
    assert torch.equal(index, place)
    close(weights, best.softmax(-1))  # the softmax of the chosen logits
    close(route(logits.softmax(-1), K, renormalize=False, scale=3.0)[1], 3 * logits.softmax(-1).gather(-1, place))


def test_a_bias_chooses_and_does_not_weigh(close):
    scores = torch.rand(30, EXPERTS, dtype=torch.float64)
    bias = torch.tensor([0.0, 5.0, 0.0, 0.0, 4.0, 0.0])
    index, weights = route(scores, K, bias=bias, renormalize=False)
    assert (index == torch.tensor([1, 4])).all() or (index.sort(-1).values == torch.tensor([1, 4])).all()
    close(weights, scores.gather(-1, index))


def test_experts_are_chosen_inside_of_the_best_groups():
    scores = torch.tensor([[0.9, 0.0, 0.5, 0.5, 0.6, 0.1]])  # the groups' two best sum to 0.9, 1.0 and 0.7
    index, _ = route(scores, 2, groups=3, top_groups=1)
    assert sorted(index[0].tolist()) == [2, 3]
    index, _ = route(scores, 3, groups=3, top_groups=2)
    assert set(index[0].tolist()) == {0, 2, 3}
    index, _ = route(scores, 2, groups=3, top_groups=1, group_best=1)
    assert sorted(index[0].tolist()) == [0, 1]


def test_scores_of_nothing_have_finite_weights():
    index, weights = route(torch.full((1, EXPERTS), -200.0).sigmoid(), K)
    assert weights.isfinite().all()


def test_the_loss_of_balance_is_switch_s(close):
    """Equation 4 with top-1, written token by token; 1 where all is even."""
    logits = torch.randn(30, EXPERTS, dtype=torch.float64)
    p, chosen = logits.softmax(-1), logits.argmax(-1)
    f = [sum(float(c == i) for c in chosen) / 30 for i in range(EXPERTS)]
    want = EXPERTS * sum(f[i] * p[:, i].mean() for i in range(EXPERTS))
    close(balance(p, chosen[:, None]), want)
    even = torch.full((6, EXPERTS), 1 / EXPERTS, dtype=torch.float64)
    index = torch.stack([torch.arange(6), (torch.arange(6) + 1) % 6], -1)
    close(balance(even, index), torch.ones((), dtype=torch.float64))
    assert load(index, EXPERTS).tolist() == F.one_hot(index, EXPERTS).sum((0, 1)).tolist() == [2] * 6


def test_what_the_reference_reads_is_what_its_experts_were_given():
    """Rows that nobody chose take no part, whatever is in them."""
    tensors, op = problem(20, (4, 1))
    want = op(**tensors)[0]
    for name in ("up", "down"):
        tensors[name] = tensors[name].clone()
        tensors[name][[0, 2, 3, 5]] = torch.nan
    assert torch.equal(op(**tensors)[0], want)
