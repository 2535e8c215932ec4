"""States after chosen tokens are those of running to these tokens."""

import pytest
import torch

from plait.ops.kernels import forced
from tests.ops.conftest import packing
from tests.ops.problems import OPS, ROWS, B, problem

AT = (0, 1, 15, 63, 64, 65, 127, 128, 149)
TOKENS = 150


def run_to(name, count, dtype=torch.float64):
    """The op over the first `count` of the same tokens, as a function of its state."""
    torch.manual_seed(1)
    return OPS[name](TOKENS, dtype, count)[0]


@pytest.mark.parametrize("form", ["chunked", "reference"])
@pytest.mark.parametrize("name", OPS)
@torch.no_grad()
def test_they_are_those_of_running_to_there(name, form, close):
    state = problem(name, 1)[1][:B].double()
    with forced(form):
        y, last, states = run_to(name, TOKENS)(state=state, at=torch.tensor(AT))
        want, wanted = run_to(name, TOKENS)(state=state)
        close(y, want)
        close(last, wanted)
        assert states.shape == (B, len(AT), *state.shape[1:])
        for i, token in enumerate(AT):
            close(states[:, i], run_to(name, token + 1)(state=state)[1])


@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("name", OPS)
@torch.no_grad()
def test_in_a_pool_they_are_as_of_values(name, rows, tokens):
    op, pool = problem(name, tokens)
    at = torch.tensor([0, 0, tokens // 2, tokens - 1])
    y, last, want = op(state=pool[rows].clone(), at=at)
    got, same, states = op(state=pool, rows=rows, at=at)
    assert same is pool
    assert torch.equal(got, y)
    assert torch.equal(pool[rows], last)
    assert torch.equal(states, want)
    pool.zero_()
    assert torch.equal(states, want)  # what goes on in the pool is another matter


@pytest.mark.parametrize("name", OPS)
@torch.no_grad()
def test_they_compile(name):
    op, pool = problem(name, 9)
    at = torch.tensor([2, 8])
    want = op(state=pool[:B], at=at)
    torch.compiler.reset()
    got = torch.compile(lambda state, at: op(state=state, at=at), fullgraph=True, backend="aot_eager")(pool[:B], at)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_wrong_calls_say_what_would_be_right():
    op, pool = problem("ssd", 9)
    at = torch.tensor([1])
    with pytest.raises(ValueError, match=r"have no gradients; call under torch.no_grad\(\)"):
        op(state=pool[:B], at=at)
    with torch.no_grad():
        with pytest.raises(ValueError, match="are of rows that start from a state; got no state"):
            op(at=at)
        with pytest.raises(ValueError, match="got packed documents"):
            op(state=pool[:B], at=at, packing=packing((3, 3, 3)))
        with pytest.raises(ValueError, match=r"at must be the numbers of some tokens, .* got \(1, 1\)"):
            op(state=pool[:B], at=at[None])
