"""A recurrence on the rows of a pool is the recurrence on their values, and touches nothing else."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plait.ops.delta import gated_delta
from plait.ops.frame import recur
from plait.ops.kernels import Kernel, Kernels, always, forced
from plait.ops.ssd import ssd
from tests.ops.conftest import packing
from tests.ops.problems import OPS, ROWS, B, G, H, K, V, problem


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("tokens", [1, 2, 70])
@pytest.mark.parametrize("name", OPS)
@torch.no_grad()
def test_rows_of_a_pool_are_values(name, tokens, rows):
    op, pool = problem(name, tokens)
    before = pool.clone()
    y, new = op(state=before[rows])
    got, same = op(state=pool, rows=rows)
    assert same is pool
    assert torch.equal(got, y)
    want = before.clone()
    want[rows] = new
    assert torch.equal(pool, want)


@pytest.mark.parametrize("tokens", [1, 2, 70])
@pytest.mark.parametrize("name", OPS)
@torch.no_grad()
def test_a_value_is_never_written_to(name, tokens):
    op, pool = problem(name, tokens)
    state = pool[:B]
    before = pool.clone()
    _, new = op(state=state)
    assert torch.equal(pool, before)
    assert new is not state


@pytest.mark.parametrize("name", OPS)
@torch.no_grad()
def test_a_pool_in_another_layout(name):
    op, pool = problem(name, 1)
    turned = pool.mT.contiguous().mT
    _, want = op(state=pool, rows=slice(0, B))
    assert torch.equal(op(state=turned, rows=slice(0, B))[1], want)


@pytest.mark.parametrize("rows", [slice(0, B), torch.tensor([5, 0, 3])], ids=["slice", "tensor"])
@torch.no_grad()
def test_a_pool_in_another_dtype_than_what_is_computed_in(rows):
    op, tail = problem("conv", 1, torch.bfloat16)
    want = op(state=tail[rows])[1]
    op(state=tail, rows=rows)
    assert torch.equal(tail[rows], want)


class Allocations(TorchDispatchMode):
    """The size of every tensor that an op made."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        new = [x for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
        self.sizes += [x.numel() for x in new if x.untyped_storage().data_ptr() not in known]
        return made


@pytest.mark.parametrize("name", ["ssd", "delta"])
@torch.no_grad()
def test_a_single_token_needs_no_second_state(name):
    """By a slice none is made, by numbers the one that is gathered."""
    op, pool = problem(name, 1)
    for rows, copies in ((slice(0, B), 0), (torch.tensor([5, 0, 3]), 1)):
        allocations = Allocations()
        allocations.sizes = []
        with allocations:
            op(state=pool, rows=rows)
        assert sum(size >= pool[:B].numel() for size in allocations.sizes) == copies


@pytest.mark.parametrize("rows", [slice(0, B), torch.tensor([5, 0, 3])], ids=["slice", "tensor"])
@pytest.mark.parametrize("name", OPS)
@torch.no_grad()
def test_it_compiles_as_one_graph(name, rows):
    op, pool = problem(name, 1)
    other = pool.clone()
    y, _ = op(state=pool, rows=rows)
    torch.compiler.reset()
    got, same = torch.compile(lambda state: op(state=state, rows=rows), fullgraph=True, backend="aot_eager")(other)
    assert same is other
    torch.testing.assert_close(got, y)
    torch.testing.assert_close(other, pool)


def test_wrong_calls_say_what_would_be_right():
    op, pool = problem("ssd", 1)
    with pytest.raises(ValueError, match=r"keeps no gradients; call under torch.no_grad\(\)"):
        op(state=pool, rows=slice(0, B))
    with torch.no_grad():
        with pytest.raises(ValueError, match="rows are those of a pool's state, .* got no state"):
            op(rows=slice(0, B))
        with pytest.raises(ValueError, match="got packed documents"):
            op(state=pool, rows=slice(0, B), packing=packing((1, 1, 1)))
        with pytest.raises(ValueError, match="rows must name one row of the pool for each of the call's 3, got 2"):
            op(state=pool, rows=slice(0, 2))


@pytest.mark.parametrize("name", OPS)
@torch.no_grad()
def test_every_form_takes_rows(name):
    op, pool = problem(name, 9)
    want, wanted = op(state=pool.clone(), rows=slice(0, B))
    with forced("reference"):
        got, same = op(state=pool, rows=slice(0, B))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(same, wanted)


@pytest.mark.parametrize("op", [ssd, gated_delta])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_is_on_queries_in_full_precision(op, dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 9, G, K, dtype=dtype), torch.randn(2, 9, G, K), torch.randn(2, 9, H, V)
    gates = [-torch.rand(2, 9, H), *([torch.rand(2, 9, H)] if op is gated_delta else [])]
    assert torch.equal(op(q, k, v, *gates, scale=0.3)[0], op(q.float() * 0.3, k, v, *gates)[0])


def test_a_form_may_take_the_pool_and_narrow_inputs_itself():
    """As kernels on a GPU do that read and write where the rows lie."""
    seen = {}

    def run(x, **given):
        seen.update(given)
        return x, given["state"]

    kernels = Kernels("ssd", (Kernel("own", run, always, rows=True),))
    x, pool, rows = torch.ones(2, 1, 3, dtype=torch.bfloat16), torch.zeros(4, 3), torch.tensor([2, 0])
    with torch.no_grad():
        y, state = recur(kernels, x, (x,), pool, rows, None, scale=0.5)
    assert y is x and state is pool
    assert seen == {"state": pool, "rows": rows, "scale": 0.5}
