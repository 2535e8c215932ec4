"""A projection's parts have the values and gradients of a split, in a graph as well."""

import pytest
import torch

from plait.ops import parts as module


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_it_is_a_split(backend):
    torch.manual_seed(0)
    x, widths = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True), [5, 1, 6]

    def run(x, split):
        a, b, c = split(x, widths)
        return (a.sin().sum(-1) * b[..., 0] + c.mean(-1)).sum()

    graph = run if backend is None else torch.compile(run, backend=backend, fullgraph=True)
    got, want = graph(x, module._parts), run(x, lambda x, widths: x.split(widths, -1))
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(total, x)[0] for total in (got, want)))
    torch.compiler.reset()


def test_a_part_that_nobody_reads_has_no_gradient():
    x = torch.randn(3, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(module._parts(x, [1, 3])[1].sum(), x)
    assert torch.equal(dx, torch.tensor([0.0, 1, 1, 1]).expand(3, 4))
