"""Layers on their own: what the laws cannot see because every call form would have it."""

import math
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import plait
from plait.design import RNN, Attention, Tokens
from plait.evaluate.laws import small
from plait.layers import context_for
from plait.layers.merges import MERGES
from plait.layers.norm import Norm
from plait.layers.rope import turn
from plait.layers.stack import LAYERS
from plait.layers.start import start
from plait.ops.attention import attention
from plait.ops.rms_norm import l2norm

DIM = 8


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


class TestNorm:
    @pytest.mark.parametrize("grad", [True, False])
    def test_plain(self, grad):
        norm, x = Norm(DIM, plait.RMSNorm(eps=1e-3)).double(), randn(2, 3, DIM)
        norm.weight.data = randn(DIM)
        with torch.set_grad_enabled(grad):
            want = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * norm.weight
            assert torch.allclose(norm(x), want)

    def test_zero_centred(self):
        norm, x = Norm(DIM, plait.RMSNorm(zero_centered=True)).double(), randn(2, DIM)
        assert norm.weight.count_nonzero() == 0
        assert torch.allclose(norm(x), F.rms_norm(x, (DIM,), eps=1e-6))

    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
    def test_zero_centred_in_16_bits_is_rounded_once(self, dtype, bits, grad):
        """1 + w is no number of 16 bits."""
        norm, x = Norm(64, plait.RMSNorm(zero_centered=True)), randn(32, 64).to(dtype)
        norm.weight.data = (0.3 * randn(64)).to(dtype)
        want = F.rms_norm(x.double(), (64,), 1 + norm.weight.double(), 1e-6)
        with torch.set_grad_enabled(grad):
            got = norm(x)
        assert got.dtype == dtype
        assert ((got.double() - want).abs() <= 1.01 * 2.0**-bits * want.abs()).all()

    def test_gradients(self):
        norm, x = Norm(DIM, plait.RMSNorm()).double(), randn(2, 3, DIM).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), (x, norm.weight)
        )

    def test_numbers_kept_are_no_mode_s_of_torch(self):
        """A model is often run without memory first, to see what it would take."""
        norm, x = Norm(DIM, plait.RMSNorm(eps=7e-3)), torch.randn(2, 3, DIM)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            norm(mode.from_tensor(x)), l2norm(mode.from_tensor(x), 7e-3)
        for y in (norm(x), l2norm(x, 7e-3)):
            assert type(y) is torch.Tensor

    def test_unit_vectors(self):
        x = randn(2, 3, 8).requires_grad_()
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert torch.allclose(l2norm(x), x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt())
        assert torch.autograd.gradcheck(l2norm, x)

    def test_bfloat16_sums_in_float32(self):
        norm = Norm(4096, plait.RMSNorm())
        x = torch.randn(3, 4096).bfloat16()
        want = F.rms_norm(x.float(), (4096,), eps=1e-6)
        assert torch.allclose(norm.bfloat16()(x).float(), want, rtol=2**-7)


class TestRoPE:
    def turned(self, x, rope, before=0):
        tokens = torch.zeros(x.shape[:2], dtype=torch.long)
        return turn(x, rope, context_for(tokens, torch.full((len(x),), before), (before,) * len(x)))

    def test_only_distance_matters(self):
        q, k = randn(1, 1, 2, 16), randn(1, 1, 2, 16)
        rope = plait.RoPE(theta=100.0)

        def score(i, j):
            return (self.turned(q, rope, i) * self.turned(k, rope, j)).sum(-1)

        assert torch.allclose(score(9, 4), score(105, 100))
        assert not torch.allclose(score(9, 4), score(9, 5))

    def test_pairs_turn_by_their_frequency(self):
        x = torch.zeros(1, 1, 1, 8, dtype=torch.float64)
        x[..., 1] = 1.0  # pair (1, 5): frequency theta^(-2/8)
        y = self.turned(x, plait.RoPE(theta=16.0), before=3)
        angle = 3 * 16.0 ** (-2 / 8)
        want = torch.zeros(8, dtype=torch.float64)
        want[1], want[5] = math.cos(angle), math.sin(angle)
        assert torch.allclose(y.flatten(), want)

    def test_part_of_a_head(self):
        x = randn(1, 5, 2, 16)
        y = self.turned(x, plait.RoPE(fraction=0.25))
        assert torch.equal(y[..., 4:], x[..., 4:])
        assert not torch.allclose(y[:, 1:, :, :4], x[:, 1:, :, :4])
        assert torch.allclose(y[..., :4], self.turned(x[..., :4], plait.RoPE()))

    def test_far_positions_in_bfloat16(self):
        """bfloat16 has no number between 4096 and 4112."""
        x = torch.ones(1, 1, 1, 16)
        y = self.turned(x.bfloat16(), plait.RoPE(), before=4097)
        assert torch.allclose(y.float(), self.turned(x, plait.RoPE(), before=4097), atol=2**-6)

    def test_gradients(self):
        x = randn(1, 3, 2, 6).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: self.turned(x, plait.RoPE(fraction=0.7)), (x,))


class TestMerges:
    branches = 3

    def merge(self, kind, **config):
        config = kind(**config)
        widths = (DIM,) * self.branches
        merge = MERGES[kind](config, DIM, widths)
        start(merge, config.learned(DIM, widths), seed=0)
        merge = merge.double()
        return merge, randn(2, 5, DIM), [randn(2, 5, DIM) for _ in range(self.branches)]

    def test_sum_and_average(self):
        merge, u, branches = self.merge(plait.Sum)
        assert torch.allclose(merge(u, branches), torch.stack(branches).sum(0))
        merge, u, branches = self.merge(plait.Average)
        assert torch.allclose(merge(u, branches), torch.stack(branches).mean(0))

    def test_learned_weights_start_where_they_are_said_to_and_keep_their_sum(self):
        merge, u, branches = self.merge(plait.Sum, weights=(0.0, 1.0, 0.5), fixed=False)
        assert torch.equal(merge(u, branches), branches[1] + 0.5 * branches[2])
        merge.shift.data = torch.tensor([0.9, -0.3, 0.0], dtype=torch.float64)
        weights = (0.7, 0.5, 0.3)  # by as much as each is off their mean, 0.2
        assert torch.allclose(merge(u, branches), sum(w * b for w, b in zip(weights, branches, strict=True)))

    def test_projection(self):
        merge, u, branches = self.merge(plait.Projection)
        assert torch.allclose(merge(u, branches), torch.cat(branches, -1) @ merge.out_proj.weight.T)

    def test_gated_starts_as_the_average(self):
        merge, u, branches = self.merge(plait.Gated)
        assert torch.allclose(merge(u, branches), torch.stack(branches).mean(0))
        merge.gate.data = randn(self.branches, DIM)
        weights = (u @ merge.gate.T).softmax(-1)  # (b, t, n)
        assert torch.allclose(merge(u, branches), (torch.stack(branches, -1) * weights[..., None, :]).sum(-1))

    def test_merge_attention(self):
        """Written as attention: one learned query, the branches as keys and values."""
        merge, u, branches = self.merge(plait.MergeAttention)
        keys = torch.stack(branches, 2) @ merge.k_proj.weight.T  # (b, t, n, d)
        values = torch.stack(branches, 2) @ merge.v_proj.weight.T
        weights = (keys @ merge.query * DIM**-0.5).softmax(-1)  # (b, t, n)
        assert torch.allclose(merge(u, branches), (weights[..., None, :] @ values).squeeze(-2))

    def test_every_merge_has_a_module(self):
        assert set(MERGES) == set(plait.design.merges.MERGE_KINDS.values())


class TestMergesAtInner:
    """The heads of several mixers before one projection."""

    layers = {  # noqa: RUF012 (read only)
        "A": plait.Attention(heads=4, head_dim=12),
        "M": plait.Mamba2(heads=3, head_dim=16, state_dim=8),
        "D": plait.GatedDeltaNet(heads=1, head_dim=8, value_heads=3, value_head_dim=16),
        "G": plait.GRU(heads=2, head_dim=24),
    }

    def build(self, pattern, merge, at=None):
        design = plait.ModelConfig(vocab=5, dim=16, pattern=pattern, layers=self.layers, merge=merge, at=at or {})
        return plait.build(design).double()

    def mixer(self, model, x):
        """The parallel layer, and what it makes of x without a state."""
        layer = model.slots[0].mixer
        return layer, layer(x, context_for(x), None)[0]

    def test_hymba(self):
        """arXiv 2411.13676, equation 3: W_out (norm(attention) + norm(SSM)) / 2."""
        x = randn(2, 5, 16)
        layer, y = self.mixer(self.build("[A|M]", plait.Average(at="inner")), x)
        heads = [branch.layers[0].inner(x, context_for(x), None)[0] for branch in layer.branches]
        assert [h.shape[-1] for h in heads] == [48, 48]
        mean = sum(norm(h) for norm, h in zip(layer.norms, heads, strict=True)) / 2
        assert torch.allclose(y, mean @ layer.merge.out_proj.weight.T)

    def test_a_sum_of_heads_is_the_sum_of_outputs_by_one_matrix(self):
        x, merge = randn(2, 5, 16), plait.Sum(branch_norm=False, weights=(0.5, 1.0, 2.0, -1.0))
        inner, outer = (self.build("[A|M|D|G]", merge.replace(at=at)) for at in ("inner", "output"))
        matrix = inner.slots[0].mixer.merge.out_proj.weight
        kept = inner.state_dict()
        for name, parameter in outer.named_parameters():
            own = name.endswith(("o_proj.weight", "out_proj.weight"))
            parameter.data.copy_(matrix if own else kept[name])
        assert torch.allclose(self.mixer(inner, x)[1], self.mixer(outer, x)[1])

    def test_a_projection_takes_heads_of_any_width(self):
        x = randn(2, 5, 16)
        wide = {"A#0": {"head_dim": 20}}
        layer, y = self.mixer(self.build("[A|M]", plait.Projection(at="inner", branch_norm=False), wide), x)
        heads = [branch.layers[0].inner(x, context_for(x), None)[0] for branch in layer.branches]
        assert [h.shape[-1] for h in heads] == [80, 48]
        assert torch.allclose(y, torch.cat(heads, -1) @ layer.merge.out_proj.weight.T)

    @pytest.mark.parametrize(
        ("pattern", "change", "message"),
        [
            (
                "[A|M]",
                {"A#0": {"heads": 5}},
                "par#0: Average at inner needs heads of equal width .* got 60 | 48 channels",
            ),
            ("[A|MF]", {}, "par#0: a merge at inner takes one layer a branch, got 'MF'"),
            ("[A|[M|D]]", {}, r"par#0: a merge at inner takes one layer a branch, got '\[M|D\]'"),
            ("[A|F]", {}, "SwiGLU has no heads to merge"),
            ("[A|M]", {"A#0": {"wrap": {"norms": "both"}}}, "A#0.* a merge at inner has no place for .* norm after"),
            (
                "[A|M]F",
                {"F#0": {"kind": "gru", "heads": 2, "head_dim": 4, "out_proj": False}},
                "GRU.out_proj: false is for the branches of a merge",
            ),
        ],
    )
    def test_what_does_not_fit(self, pattern, change, message):
        with pytest.raises(ValueError, match=message):
            self.build(pattern, plait.Average(at="inner"), change)


def build_one(letter, config, **design):
    design = plait.ModelConfig(vocab=5, dim=16, pattern=letter, layers={letter: config}, **design)
    return plait.build(design).place(f"{letter}#0").double()


def test_every_layer_has_a_module():
    assert set(LAYERS) == set(plait.design.layers.KINDS.values())


def test_attention_written_out():
    """Gate, norms and grouping in the order of Qwen3-Next: norm, turn, attend, gate, project."""
    config = plait.Attention(
        heads=4, kv_heads=2, head_dim=6, qk_norm=True, output_gate=True, rope=plait.RoPE(fraction=0.5)
    )
    layer, x = build_one("A", config), randn(2, 7, 16)
    layer.q_norm.weight.data, layer.k_norm.weight.data = randn(6), randn(6)
    context = context_for(torch.zeros(2, 7, dtype=torch.long))
    q, k, v, gate = (x @ layer.qkv_proj.weight.T).split([24, 12, 12, 24], -1)
    q, k, v = (y.unflatten(-1, (-1, 6)) for y in (q, k, v))
    q, k = layer.q_norm(q), layer.k_norm(k)
    q, k = turn(q, config.rope, context), turn(k, config.rope, context)
    o = attention(q, k, v).flatten(2) * torch.sigmoid(gate)
    assert torch.allclose(layer(x, context, None)[0], o @ layer.o_proj.weight.T)


@pytest.mark.parametrize(
    ("config", "act"),
    [
        (plait.SwiGLU(hidden=6, bias=True), lambda h: F.silu(h[..., :6]) * h[..., 6:]),
        (plait.GELU(hidden=6), lambda h: F.gelu(h, approximate="tanh")),
        (plait.ReLU2(hidden=6), lambda h: h.clamp_min(0) ** 2),
    ],
)
def test_feed_forward(config, act):
    layer, x = build_one("F", config), randn(2, 3, 16)
    want = F.linear(
        act(F.linear(x, layer.up_proj.weight, layer.up_proj.bias)), layer.down_proj.weight, layer.down_proj.bias
    )
    assert torch.allclose(layer(x, context_for(torch.zeros(2, 3, dtype=torch.long)), None)[0], want)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x, context_for(torch.zeros(2, 3, dtype=torch.long)), None)[0], (x,))


def test_a_branch_is_a_residual_chain():
    """[DF|A]: the feed-forward layer reads the norm of u plus what D said, and the branch says what both added."""
    design = plait.ModelConfig(vocab=5, dim=64, pattern="[DF|A]:sum", merge=plait.Sum(branch_norm=False))
    slot = plait.build(design, dtype=torch.float64).slots[0].mixer
    u, context = randn(1, 6, 64), context_for(torch.zeros(1, 6, dtype=torch.long))
    delta, feed_forward = slot.branches[0].layers
    first = delta(u, context, None)[0]
    second = feed_forward(slot.branches[0].norms["1"](u + first), context, None)[0]
    other = slot.branches[1].layers[0](u, context, None)[0]
    assert torch.allclose(slot(u, context, None)[0], first + second + other)


def test_branches_are_normed_unless_told_otherwise():
    for merge, norms in ((plait.Average(), 2), (plait.Average(branch_norm=False), 0)):
        slot = plait.build(plait.ModelConfig(vocab=5, dim=64, pattern="[D|A]", merge=merge)).slots[0].mixer
        assert len(slot.norms or ()) == norms


def test_shared_layers_share_weights_but_not_norms():
    layers = {"F": plait.SwiGLU(shared=True), "D": plait.GatedDeltaNet()}
    model = plait.build(plait.ModelConfig(vocab=5, dim=64, pattern="FD[F|D]", layers=layers))
    first, _, third = (slot.mixer for slot in model.slots)
    assert third.branches[0].layers[0] is first
    assert third.branches[1].layers[0] is not model.slots[1].mixer
    assert model.slots[0].norm is not model.slots[2].norm
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(set(names))


def test_decays_of_fresh_layers():
    model = plait.build(plait.ModelConfig(vocab=5, dim=1024, pattern="MD"))
    mamba, delta = (slot.mixer for slot in model.slots)
    step = F.softplus(mamba.dt_bias)
    assert step.min() > 0.9e-3
    assert step.max() < 0.11
    assert mamba.A_log.exp().min() >= 1
    assert mamba.A_log.exp().max() <= 16
    assert torch.equal(mamba.D, torch.ones(32))
    assert delta.A_log.exp().max() <= 16
    assert torch.equal(delta.dt_bias, torch.ones(8))


@pytest.mark.parametrize(("pattern", "graphs"), [("(GF)4", 2), ("(MF)3", 2), ("([H|D]F)3", 2), ("(AF)3", 3)])
def test_equal_slots_are_one_graph(pattern, graphs):
    """But for the first attention layer, which makes what all of them share."""
    model, compiler = plait.build(small(pattern)), CompileCounter()
    torch.compiler.reset()
    for slot in model.slots:
        slot.compile(backend=compiler)
    with torch.no_grad():
        model(torch.arange(20)[None] % 11)
    torch.compiler.reset()
    assert compiler.frame_count == graphs


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own doing
def test_documents_of_any_number_and_lengths_are_two_graphs():
    """One for the first batch and one for all others, in slots with every kind of layer. Law 11 takes gradients too."""
    model = plait.build(small("[A|W|Capped|M] [D|G|H|S|N]F", Capped=Attention(heads=2, softcap=2.0), N=RNN(heads=2)))
    compiler, random = CompileCounter(), Random(0)
    torch.compiler.reset()
    for slot in model.slots:
        slot.compile(backend=compiler, fullgraph=True)
    for _ in range(25):
        cuts = [0, *sorted(random.sample(range(1, 80), random.choice([0, 1, 4, 30]))), 80]
        model(torch.arange(80)[None] % 11, cu_seqlens=torch.tensor(cuts))
    torch.compiler.reset()
    assert compiler.frame_count == 2 * 2 + 1  # F knows nothing of documents


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own doing
def test_rows_as_long_as_their_documents_are_many_are_two_graphs_too():
    """Meta tokens stand before every document. No layer's graph is that of one length, then."""
    model = plait.build(small("[A|M|R|Hg] [D|Gl|Mg|Ml|Ma]", front=Tokens(meta=3)))
    compiler = CompileCounter()
    torch.compiler.reset()
    for slot in model.slots:
        slot.compile(backend=compiler, fullgraph=True)
    for cuts in ([0, 80], *([0, *range(n, 80, n), 80] for n in (2, 5, 9, 30, 41))):
        model(torch.arange(80)[None] % 11, cu_seqlens=torch.tensor(cuts))
    torch.compiler.reset()
    assert compiler.frame_count == 2 * 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own doing
@pytest.mark.parametrize("pattern", ["AFA", "G[M|S]F"])
def test_slots_are_recomputed_by_the_graphs_they_ran_in(pattern):
    plain, model = plait.build(small(pattern)), plait.build(small(pattern))
    torch.compiler.reset()
    model.activation_checkpointing = True
    for slot in model.slots:
        slot.compile(backend="aot_eager")
    tokens = torch.arange(40)[None] % 11
    for bounds in ([0, 10, 40], [0, 40], [0, 3, 9, 40]):
        for each in (plain, model):
            each(tokens, cu_seqlens=torch.tensor(bounds))[0].square().mean().backward()
    torch.compiler.reset()
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-6)  # float32, of small numbers
