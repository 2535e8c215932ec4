"""What a layer that takes an attention layer's place starts from."""

import copy

import pytest
import torch
import torch.nn.functional as F

import plait
from plait.convert import Plan, student_of
from plait.convert.transfer import TRANSFER
from plait.convert.transfer.calibrate import calibrate
from plait.convert.transfer.linear import TAP
from plait.convert.transfer.parts import heads_of
from plait.convert.transfer.starts import STARTS
from plait.design.layers import KINDS
from plait.layers import context_for
from plait.ops.rotary import rotate
from plait.state import Recurrent

DIM, HEADS, GROUPS, SIZE, T = 64, 4, 2, 16, 24
TOLERANCE = 1e-9  # float64: a decomposition's rounding
BY_NAME = {kind: name for name, kind in KINDS.items()}
RATES = torch.tensor([0.7, 0.05, 0.2, 0.003], dtype=torch.float64)


def teacher_of(pattern="(AF)2", **attention):
    layer = {"kind": "attention", "heads": HEADS, "kv_heads": GROUPS, "head_dim": SIZE, **attention}
    design = {"vocab": 61, "dim": DIM, "pattern": pattern, "layers": {"A": layer}}
    return plait.build(design, seed=3, dtype=torch.float64)


def some_text(rows=2, length=T):
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(1))


def converted(teacher, mixer, **how):
    """All attention replaced."""
    places = [address for address in teacher.design.places() if address.startswith("A")]
    return student_of(teacher, Plan.of(teacher, "teacher", dict.fromkeys(places, mixer)), **how)


@torch.no_grad()
def differs(student, teacher):
    x = some_text()
    return (student(x)[0] - teacher(x)[0]).abs().max().item()


@pytest.mark.parametrize(
    "attention",
    [
        {},
        {"qk_norm": True, "output_gate": True},
        {"qk_norm": "wide"},
        {"bias": ("q", "k", "v")},
        {"rope": None},
        {"sinks": True},
    ],
    ids=lambda a: ",".join(a) or "plain",
)
def test_a_window_over_the_whole_text_is_the_teacher(attention):
    teacher = teacher_of(**attention)
    for parameter in teacher.parameters():
        parameter.data.add_(0.1)  # biases, sinks and norms of their own
    assert differs(converted(teacher, {"window": T}), teacher) == 0
    assert differs(converted(teacher, {"window": T - 4, "prefix": 4}), teacher) <= TOLERANCE  # by another kernel
    assert differs(converted(teacher, {"window": 3}), teacher) > 1e-4


@pytest.mark.parametrize("mixer", [{"window": T}, {"output_gate": True}, {"branches": ["gated_deltanet", "attention"]}])
@pytest.mark.parametrize("shared", [{}, {"adapter_rank": 3}], ids=["shared", "adapted"])
def test_a_shared_layer_is_what_each_use_made_of_it(shared, mixer):
    teacher = teacher_of(shared=True, **shared)
    for parameter in teacher.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)  # additions start at zero
    assert differs(converted(teacher, mixer), teacher) <= TOLERANCE


@pytest.mark.parametrize("bias", [False, True])
def test_a_new_gate_changes_nothing(bias):
    teacher = teacher_of(bias=bias)
    for name, parameter in teacher.named_parameters():
        if name.endswith("qkv_proj.bias"):
            parameter.data.normal_()
    assert differs(converted(teacher, {"output_gate": True}), teacher) <= TOLERANCE


@pytest.mark.parametrize("mixer", [{}, {"query_rank": DIM}, {"nope_dim": SIZE + 3, "rope_dim": 5}])
def test_latent_attention_of_full_rank_is_attention_without_positions(mixer):
    teacher = teacher_of(rope=None)
    full = {"kind": "latent_attention", "rank": 2 * GROUPS * SIZE, **mixer}
    if "query_rank" in mixer:
        assert converted(teacher, full).place("L#0").config.latent_norm is False
    assert differs(converted(teacher, full), teacher) <= TOLERANCE
    assert differs(converted(teacher, full | {"rank": 40}), teacher) > 1e-3


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_latent_attention_is_attention_with_positions_of_one_key(fraction):
    teacher = teacher_of(kv_heads=1, rope={"theta": 500.0, "fraction": fraction})
    turned = int(SIZE * fraction)
    rope = {"theta": 500.0}
    mixer = {
        "kind": "latent_attention",
        "rank": 32,
        "rope_dim": turned,
        "nope_dim": max(1, SIZE - turned),
        "rope": rope,
    }
    assert differs(converted(teacher, mixer), teacher) <= TOLERANCE


def test_latent_attention_shares_keys_that_differ_by_a_turn_and_a_length():
    teacher = teacher_of(pattern="A")
    weight = teacher.place("A#0").qkv_proj.weight.data
    one, other = weight[HEADS * SIZE :][: GROUPS * SIZE].view(GROUPS, SIZE, DIM)
    angles = torch.linspace(0.1, 3, SIZE // 2, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    turned = rotate(one.T[None, :, None], cos.view(1, 1, 1, 1, -1), torch.stack([-sin, sin]).view(1, 1, 1, 2, -1))
    other.copy_(1.7 * turned[0, :, 0].T)
    rank = GROUPS * SIZE  # of the values; keys have none in the latent
    mixer = {"kind": "latent_attention", "rank": rank, "rope_dim": SIZE, "nope_dim": 1}
    assert differs(converted(teacher, mixer), teacher) <= TOLERANCE


def split(layer):
    """q (t, h, k), k and v, each group's for all of its heads, from the attention layer's rows."""
    q, k, v = layer.qkv_proj.weight.detach().split([HEADS * SIZE, GROUPS * SIZE, GROUPS * SIZE])
    heads = [h * GROUPS // HEADS for h in range(HEADS)]
    return q.view(HEADS, SIZE, -1), k.view(GROUPS, SIZE, -1)[heads], v.view(GROUPS, SIZE, -1)[heads]


def recurrence(q, k, v, decay, remove=None):
    """S = a S + v k^T, o = S q; or with strengths b, S = a S (1 - b k k^T) + b v k^T. q, k, v (t, h, k), decay (t, h)."""
    S, out = torch.zeros(HEADS, SIZE, SIZE, dtype=torch.float64), []
    for t in range(len(q)):
        S = decay[t][:, None, None] * S
        write = v[t] if remove is None else remove[t][:, None] * (v[t] - torch.einsum("hvk,hk->hv", S, k[t]))
        S = S + torch.einsum("hv,hk->hvk", write, k[t])
        out.append(torch.einsum("hvk,hk->hv", S, q[t]))
    return torch.stack(out)


def normed(x, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def turned(x, theta=10_000.0):
    """x (t, h, k), channels i and i + k/2 a complex number that turns by theta^(-2 i / k) a token."""
    z = torch.complex(*x.chunk(2, -1))
    turns = theta ** -(torch.arange(SIZE // 2).double() / (SIZE // 2))
    z = z * torch.polar(torch.ones(()).double(), torch.outer(torch.arange(len(x)).double(), turns))[:, None]
    return torch.cat([z.real, z.imag], -1)


def projected(x, rows):
    return torch.einsum("td,hkd->thk", x, rows)


def simple_gla(x, q, k, v, new):
    *_, gate, g = new.in_proj.weight.split([w for _, w in new.in_proj.parts])
    a = torch.sigmoid(x @ g.T + new.g_bias) ** (1 / 16)
    q, k, v = (projected(x, w) for w in (q, k, v))
    o = recurrence(turned(q), turned(k), v, a) * SIZE**-0.5
    return normed(o).flatten(1) * F.silu(x @ gate.T)


def lightning(x, q, k, v, new):
    gate = new.in_proj.weight[-HEADS * SIZE :]
    a = torch.exp(-(2.0 ** (-8 * (torch.arange(HEADS).double() + 1) / HEADS))).expand(len(x), -1)
    q, k, v = (F.silu(projected(x, w)) for w in (q, k, v))
    o = recurrence(turned(q), turned(k), v, a)
    return normed(o.flatten(1)) * torch.sigmoid(x @ gate.T)


def gated_deltanet(x, q, k, v, new):
    *_, z, b, a = new.in_proj.weight.split([w for _, w in new.in_proj.parts])
    q, k, v = (F.silu(TAP * projected(x, w)) for w in (q, k, v))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    decay = torch.exp(-new.A_log.exp() * F.softplus(x @ a.T + new.dt_bias))
    o = recurrence(turned(q), turned(k), v, decay, torch.sigmoid(x @ b.T)) * SIZE**-0.5
    return normed(o).flatten(1) * F.silu(x @ z.T)


def mamba2(x, q, k, v, new):
    z, *_, dt = new.in_proj.weight.split([w for _, w in new.in_proj.parts])
    q, k, v = (F.silu(TAP * projected(x, w)) for w in (q, k, v))
    step = F.softplus(x @ dt.T + new.dt_bias)
    o = recurrence(q, k, v * step[..., None], torch.exp(-new.A_log.exp() * step)) + new.D[:, None] * v
    return normed(o * F.silu(x @ z.T).view(o.shape)).flatten(1)


REFERENCES = {
    "simple_gla": simple_gla,
    "lightning_attention": lightning,
    "gated_deltanet": gated_deltanet,
    "mamba2": mamba2,
}


@pytest.mark.parametrize("kind", REFERENCES)
@torch.no_grad()
def test_recurrences_read_and_write_with_the_teacher_s_rows(kind):
    """The layer is its published formula, one token after the other, of the attention layer's own q, k, v and o."""
    teacher = teacher_of(pattern="A")
    new, old = converted(teacher, kind).slots[0].mixer, teacher.place("A#0")
    x = torch.randn(T, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    want = REFERENCES[kind](x, *split(old), new) @ old.o_proj.weight.T
    got = new(x[None], context_for(x[None]), None)[0][0]
    assert (got - want).abs().max() <= TOLERANCE * want.abs().max()


@pytest.mark.parametrize("kind", [BY_NAME[kind] for kind in STARTS])
@torch.no_grad()
def test_calibration_brings_a_layer_nearer_to_the_old_one(kind):
    teacher = teacher_of(pattern="A", qk_norm=True)
    old, new = teacher.place("A#0"), converted(teacher, kind).slots[0].mixer
    x = torch.randn(8, 64, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.5
    theirs, before = (layer(x, context_for(x), None)[0] for layer in (old, new))
    calibrate(old, new, x)
    after = new(x, context_for(x), None)[0]
    assert (after - theirs).square().sum() < min((before - theirs).square().sum(), theirs.square().sum())


@pytest.mark.parametrize("kind", [BY_NAME[kind] for kind, start in STARTS.items() if start.forget])
@torch.no_grad()
def test_heads_forget_at_the_rate_that_they_are_given(kind):
    """Without anything to read, a token leaves exp(-rate) of what is remembered."""
    if kind == "mlstm":  # its state is stabilised: seen in its op's own gate instead
        new = converted(teacher_of(pattern="A"), kind).slots[0].mixer
        STARTS[type(new.config)].forget(new, RATES)
        kept = F.logsigmoid(new.capped(torch.zeros(HEADS, dtype=torch.float64), new.f_bias))
        assert (kept + RATES).abs().max() < 0.02 * RATES.max()  # the cap bends gates by up to 2 % of 15
        return
    model = converted(teacher_of(pattern="A"), kind)
    new = model.slots[0].mixer
    STARTS[type(new.config)].gates(new, torch.ones(DIM, dtype=torch.float64))
    STARTS[type(new.config)].forget(new, RATES)
    state = model.init_state(1).slots[0]
    s = torch.rand(state.s.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    if kind == "lstm":
        s[:, 0] = 0  # h is not what is kept
    x = torch.zeros(1, 1, DIM, dtype=torch.float64)
    after = new(x, context_for(x), Recurrent(s.clone(), state.conv))[1].s
    before, after = (y[:, -1] if kind in ("gru", "lstm") else y for y in (s, after))
    lost = -(after / before).log().view(HEADS, -1)
    assert (lost - RATES[:, None]).abs().max() <= 1e-6 * RATES.max() + 1e-7  # biases are float32


@pytest.mark.parametrize("norm", [True, "wide"])
def test_norms_of_queries_and_keys_are_in_the_rows(norm):
    """Of inputs whose channels are alike, queries and keys are as long on average as the teacher's normed ones."""
    teacher = teacher_of(pattern="A", qk_norm=norm)
    old = teacher.place("A#0")
    with torch.no_grad():
        for weight in (old.q_norm.weight, old.k_norm.weight):
            weight.uniform_(0.5, 2)
        x = torch.randn(4000, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        q, k, _ = old.qkv_proj(x).split([HEADS * SIZE, GROUPS * SIZE, GROUPS * SIZE], -1)
        for rows, y, norm_of in ((heads_of(old).q, q, old.q_norm), (heads_of(old).k, k, old.k_norm)):
            y = norm_of(y if norm == "wide" else y.unflatten(-1, (-1, SIZE))).reshape(len(x), -1, SIZE)
            ratio = projected(x, rows).square().mean(0) / y.square().mean(0)
            # a norm divides by each token's own length, a matrix by the mean
            assert ratio.min() > 0.8 and ratio.max() < 1.25


def test_the_teacher_stays_as_it_is():
    teacher = teacher_of()
    before = copy.deepcopy(teacher.state_dict())
    for kind in TRANSFER:
        student = converted(teacher, BY_NAME[kind], text=some_text())
        assert student.embed is teacher.embed and student.slots[1] is teacher.slots[1]
        assert student.slots[0].norm is teacher.slots[0].norm
        assert student(some_text())[0].isfinite().all()
    after = teacher.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not teacher.place("A#0")._forward_pre_hooks
