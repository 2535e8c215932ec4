"""What a compiled graph is told of an operator on packed documents is so: shapes, strides, dtypes, and no shared memory."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from plait.ops.attention import one_by_one, packed
from plait.ops.delta import gated_delta
from plait.ops.gla import dplr, gla
from plait.ops.kernels import forced
from plait.ops.mlstm import mlstm
from plait.ops.moe import experts
from plait.ops.packing import Packing
from plait.ops.selective import selective_scan
from plait.ops.shooting import GRU, LSTM, shooting
from plait.ops.ssd import ssd
from tests.ops.conftest import DOCUMENTS, packing

T = sum(DOCUMENTS)


class Told(TorchDispatchMode):
    """Compares every call of an operator of plait with what its fake implementation says of it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function.namespace != "plait":
            return found
        self.names.append(function.name())
        mode, plain = FakeTensorMode(), tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        with mode:
            told = function(*tree_map_only(torch.Tensor, mode.from_tensor, plain))
        real, fake = (tree_leaves(x) for x in (found, told))
        assert len(real) == len(fake)
        for got, said in zip(real, fake, strict=True):
            assert got.dtype == said.dtype
            assert got.shape == said.shape
            assert _strides(got) == _strides(said)
        memory = [_memory(x) for x in real if x.numel()]
        assert len(set(memory)) == len(memory)
        assert not set(memory) & {_memory(x) for x in tree_leaves(args) if torch.is_tensor(x) and x.numel()}
        return found


def _strides(x):
    """Where there is more than one number to step to."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def _memory(x):
    return x.untyped_storage().data_ptr()


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def linear(op, groups, heads):
    gates = [-torch.rand(1, T, heads), *([torch.rand(1, T, heads)] if op is gated_delta else [])]
    inputs = [
        randn(1, T, groups, 6),
        randn(1, T, groups, 6),
        randn(1, T, heads, 5),
        *(x.requires_grad_() for x in gates),
    ]
    return lambda **call: op(*inputs, **call), (heads, 5, 6)


def nonlinear(cell, matrix):
    g = len(cell.inputs)
    x, bound = randn(1, T, g, 2, 4), cell.bind(randn(g, 2, 4, *([4] if matrix else [])) / 4)
    return lambda **call: shooting(bound, x, **call)[:2], (len(cell.states), 2, 4)


RECURRENCES = {
    "ssd": lambda: linear(ssd, 2, 4),
    "ssd, one group": lambda: linear(ssd, 1, 4),
    "ssd, one head": lambda: linear(ssd, 1, 1),
    "delta": lambda: linear(gated_delta, 2, 4),
    "delta, one head": lambda: linear(gated_delta, 1, 1),
    "gru": lambda: nonlinear(GRU(), False),
    "lstm": lambda: nonlinear(LSTM(), True),
}


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("name", RECURRENCES)
def test_recurrences(name, state):
    op, shape = RECURRENCES[name]()
    given = {"state": randn(len(DOCUMENTS), *shape)} if state else {}
    with Told() as told, forced("chunked"):
        outputs = op(packing=packing(), **given)
        sum(x.sum() for x in outputs if x is not None).backward()
    assert len(told.names) == 2


PER_CHANNEL = {
    "gla": lambda q, k, v, g, p, z, **call: gla(q, k, v, g, **call),
    "delta": lambda q, k, v, g, p, z, **call: dplr(q, k, v, g, p, **call),
    "dplr": dplr,
}


@pytest.mark.parametrize("given", ["nothing", "state", "packing"])
@pytest.mark.parametrize("name", PER_CHANNEL)
def test_decays_per_channel(name, given):
    q, k, g, p, z = (randn(1, 150, 2, 6) for _ in range(5))
    call = {"nothing": {}, "state": {"state": randn(1, 2, 5, 6)}, "packing": {"packing": packing((20, 130))}}[given]
    with Told() as told, forced("chunked"):
        o, S = PER_CHANNEL[name](q, k, randn(1, 150, 2, 5), -g.abs(), p / 9, z / 9, **call)
        sum(x.square().sum() for x in (o, S) if x is not None).backward()
    steps = {"decayed", "carry"} | ({"decayed_solve"} if name != "gla" else set())
    assert set(told.names) == {f"plait::{step}{way}" for step in steps for way in ("", "_backward")}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks
@pytest.mark.parametrize("name", PER_CHANNEL)
def test_a_graph_of_decays_per_channel_does_not_grow_with_the_sequence(name):
    """Compiled as steps on chunks one after the other, RWKV-7 took inductor minutes."""

    def nodes(length):
        sizes = []

        def count(graph, inputs):
            sizes.append(len(graph.graph.nodes))
            return make_boxed_func(graph)

        q, k, v, p, z = (randn(1, length, 2, 8) for _ in range(5))
        g = torch.full_like(q, -1.0, requires_grad=True)
        torch.compiler.reset()
        with forced("chunked"):
            run = torch.compile(
                PER_CHANNEL[name], fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=count)
            )
            run(q, k, v, -g.abs(), p / 9, z / 9)[0].sum().backward()
        torch.compiler.reset()
        return sizes

    short = nodes(128)
    assert len(short) == 2
    assert short == nodes(512)


@pytest.mark.parametrize("state", [False, True])
def test_the_delta_rule_in_rows(state):
    op, shape = RECURRENCES["delta"]()
    with Told() as told, forced("chunked"):
        o, S = op(state=randn(1, *shape) if state else None)
        sum(x.sum() for x in (o, S) if x is not None).backward()
    assert told.names == ["plait::delta_rows", "plait::delta_rows_backward"]


@pytest.mark.parametrize("packed", [False, True])
def test_selective_scan(packed):
    x, dt, B, C = (randn(1, T, n) for n in (5, 5, 3, 3))
    given = {"packing": packing()} if packed else {"state": randn(1, 5, 3)}
    with Told() as told, forced("chunked"):
        outputs = selective_scan(x, dt.abs(), -randn(5, 3).abs(), B, C, **given)
        sum(y.sum() for y in outputs if y is not None).backward()
    assert len(told.names) == 2


@pytest.mark.parametrize("name", ["gru", "lstm"])
@torch.no_grad()
def test_states_after_chosen_tokens(name):
    op, state = RECURRENCES[name]()
    with Told() as told:
        op(state=randn(1, *state), at=torch.tensor([0, 5]))
    assert len(told.names) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_mlstm(packed):
    """Gates lie heads first, as no layer's do."""
    q, k, v = (randn(1, T, 2, n) for n in (6, 6, 5))
    i, f = (randn(1, 2, T).mT for _ in "if")
    with Told() as told:
        mlstm(q, k, v, i, f, packing=packing() if packed else None)[0].sum().backward()
    own = {"plait::mlstm_gates", "plait::mlstm_gates_backward"}
    assert set(told.names) - own == ({"plait::ssd", "plait::ssd_backward"} if packed else set())
    assert own <= set(told.names)


def test_experts():
    index, weights = torch.rand(1, T, 5).topk(2, -1).indices, torch.rand(1, T, 2, requires_grad=True)
    with Told() as told:
        experts(randn(1, T, 6), randn(5, 8, 6), randn(5, 7, 4), index, weights).sum().backward()
    assert told.names == ["plait::experts", "plait::experts_backward"]


@pytest.mark.parametrize(("window", "prefix"), [(None, 0), (3, 0), (3, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("sinks", [True, False])
def test_attention(sinks, together, dtype, window, prefix):
    sinks = randn(4) if sinks else None
    q, k, v = randn(1, T, 4, 8, dtype=dtype), randn(1, T, 2, 8, dtype=dtype), randn(1, T, 2, 8, dtype=dtype)
    with Told() as told:
        if together:
            o = packed._Together.apply(q, k, v, sinks, packing().cu_seqlens, window, prefix, 0.3)
        else:
            o = one_by_one._Apart.apply(q, k, v, sinks, packing().cu_seqlens, window, prefix, 2.0, 0.3, "chunked")
        o.sum().backward()
    assert len(told.names) == 2


@pytest.mark.parametrize("documents", [DOCUMENTS, (1,), (5,), (1, 1, 1), (300,)])
def test_a_packing_in_shapes_that_follow_its_arguments(documents):
    known, like = packing(documents), torch.zeros(1, sum(documents))
    with Told():
        offsets, number, index, back = torch.ops.plait.packing(known.cu_seqlens, like)
    assert torch.equal(offsets, known.offsets)
    assert torch.equal(number, known.documents)
    assert torch.equal(back, known.back)
    assert torch.equal(index[: len(known.index)], known.index)
    assert (index[len(known.index) :] == sum(documents)).all()


def test_equal_offsets_are_one_packing():
    like = torch.zeros(1, 5, 3)
    first = Packing.of(torch.tensor([0, 2, 5], dtype=torch.int32), like)
    assert Packing.of(torch.tensor([0, 2, 5]), like) is first
    assert Packing.of(torch.tensor([0, 3, 5]), like) is not first
