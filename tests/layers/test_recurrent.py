"""Recurrent layers against torch.nn's modules, the papers' equations written out, and what they report."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import plait
from plait.design.layers.recurrent import EMPTY
from plait.layers import context_for
from plait.layers.recurrent import CELLS, RecurrentCell, cell_of
from plait.ops import shooting
from plait.ops.packing import Packing
from plait.ops.shooting import NotConverged

DIM, HEADS, K = 12, 3, 5


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def cell(config, **changes):
    """A float64 cell whose every number is moved off where it starts."""
    made = RecurrentCell(config(heads=HEADS, head_dim=K, **changes), DIM).double()
    for parameter in made.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def gradients(y, inputs):
    """Of a fixed random sum of y."""
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return torch.autograd.grad((y * weight).sum(), inputs)


TORCH = {
    "RNN": lambda **options: nn.RNN(6, 7, **options),
    "RNN relu": lambda **options: nn.RNN(6, 7, nonlinearity="relu", **options),
    "GRU": lambda **options: nn.GRU(6, 7, **options),
    "LSTM": lambda **options: nn.LSTM(6, 7, **options),
}


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"batch_first": True}], ids=["plain", "no bias", "batch first"]
)
@pytest.mark.parametrize("make", TORCH.values(), ids=TORCH)
def test_from_torch(make, options):
    """Forward, last states, and the gradients at the input, the first states and every weight."""
    module = make(**options).double()
    made = RecurrentCell.from_torch(module)
    lstm = isinstance(module, nn.LSTM)
    x, s = randn(3, 100, 6).requires_grad_(), randn(3, 2 if lstm else 1, 1, 7).requires_grad_()
    first = [part[:, 0][None] for part in s.unbind(1)]
    order = (lambda y: y) if module.batch_first else (lambda y: y.transpose(0, 1))
    want, last = module(order(x), tuple(first) if lstm else first[0])
    want, last = order(want), torch.stack([*last] if lstm else [last], 2)[0]  # (n, s, k)
    h, final, info = made(x, s)
    assert int(info.passes) > 1 and not info.fell_back
    assert torch.allclose(h, want, atol=1e-11) and torch.allclose(final[:, :, 0], last, atol=1e-11)
    theirs = gradients(torch.cat([want.flatten(), last.flatten()]), [x, s, *module.parameters()])
    ours = gradients(torch.cat([h.flatten(), final.flatten()]), [x, s, *made.parameters()])
    for got, expected in zip(ours[:2], theirs[:2], strict=True):
        assert torch.allclose(got, expected, atol=1e-10)
    names = {"in_proj.weight": "weight_ih_l0", "R": "weight_hh_l0", "in_proj.bias": "bias_ih_l0"}
    names["recurrent_bias"] = "bias_hh_l0"
    found = dict(zip([name for name, _ in module.named_parameters()], theirs[2:], strict=True))
    for (name, parameter), got in zip(made.named_parameters(), ours[2:], strict=True):
        assert torch.allclose(got, in_our_order(module, found[names[name]]).view_as(parameter), atol=1e-10), name


def in_our_order(module, rows):
    """torch: GRU r, z, n and LSTM i, f, g, o; here z (of the opposite sign), r, c and f, z, o, i."""
    if isinstance(module, nn.GRU):
        return torch.cat([-rows[7:14], rows[:7], rows[14:]])
    if isinstance(module, nn.LSTM):
        return torch.cat([rows[7:14], rows[14:21], rows[21:], rows[:7]])
    return rows


def test_from_torch_keeps_dtype_and_says_what_it_cannot():
    assert RecurrentCell.from_torch(nn.GRU(3, 4).bfloat16()).R.dtype == torch.bfloat16
    for module, message in (
        (nn.GRU(3, 4, num_layers=2), "num_layers 2; convert one layer at a time"),
        (nn.LSTM(3, 4, bidirectional=True), "bidirectional"),
        (nn.LSTM(3, 4, proj_size=2), "proj_size 2"),
    ):
        with pytest.raises(ValueError, match=message):
            RecurrentCell.from_torch(module)
    with pytest.raises(TypeError, match="RNN, GRU or LSTM, got Linear"):
        RecurrentCell.from_torch(nn.Linear(3, 4))


def parts(made, x):
    """Projected inputs by name, (b, t, h, k), and recurrent weights by name."""
    named = dict(zip(made.cell.inputs, made.project(x).unbind(2), strict=True))
    return named, dict(zip(made.cell.inputs, made.bound().recurrent, strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_head_wise_projection(bias):
    """Head i reads channels i dim/heads to (i + 1) dim/heads; nothing is copied into the order that the op reads."""
    made, x = cell(plait.GRU, projection="heads", bias=bias), randn(2, 9, DIM)
    got = made.project(x)
    own = x.unflatten(-1, (HEADS, -1))
    want = torch.einsum("bthd,hgkd->btghk", own, made.in_proj.weight.unflatten(1, (3, K)))
    assert torch.allclose(got, want + made.in_proj.bias.view(3, HEADS, K) if bias else want)
    assert got.permute(3, 0, 1, 2, 4).is_contiguous()


def test_dense_recurrence_over_a_head_wise_projection():
    """Units keep their order whoever hears of them."""
    one, other = (cell(plait.GRU, projection="heads", recurrence=r) for r in ("diagonal", "dense"))
    for name in ("in_proj.weight", "in_proj.bias"):
        other.get_parameter(name).data.copy_(one.get_parameter(name))
    other.R.data.copy_(torch.diag_embed(one.R.view(3, 1, -1)))
    x = randn(2, 30, DIM)
    assert torch.allclose(one(x)[0], other(x)[0], atol=1e-11)


def para_gru(x, a):
    """ParaGRU, arXiv 2510.21450, section 4."""
    h, outputs = torch.zeros_like(x["z"][:, 0]), []
    for t in range(x["z"].shape[1]):
        z = torch.sigmoid(a["z"] * h + x["z"][:, t])
        r = torch.sigmoid(a["r"] * h + x["r"][:, t])
        c = torch.tanh(a["c"] * (h * r) + x["c"][:, t])
        h = (1 - z) * h + z * c
        outputs.append(h)
    return torch.stack(outputs, 1).flatten(2)


def para_lstm(x, a, p_f, p_o):
    """ParaLSTM, the same section."""
    h = c = torch.zeros_like(x["f"][:, 0])
    outputs = []
    for t in range(x["f"].shape[1]):
        f = torch.sigmoid(a["f"] * h + x["f"][:, t] + p_f * c)
        z = torch.tanh(a["z"] * h + x["z"][:, t])
        c = f * c + (1 - f) * z
        o = torch.sigmoid(a["o"] * h + x["o"][:, t] + p_o * c)
        h = o * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs, 1).flatten(2)


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_cells_of_pararnn(kind, clip):
    made = cell(plait.GRU, clip=clip) if kind == "gru" else cell(plait.LSTM, coupled=True, peephole=True, clip=clip)
    x = randn(2, 90, DIM).requires_grad_()
    named, a = parts(made, x)
    if clip is not None:
        a = {name: w.view(HEADS, K) for name, w in zip(a, made.R.clamp(-clip, clip).view(3, -1), strict=True)}
    if kind == "gru":
        want = para_gru(named, a)
    else:
        weights = made.weights if clip is None else made.weights.clamp(-clip, clip)
        want = para_lstm(named, a, *weights.view(2, HEADS, K))
    got, _, info = made(x)
    assert torch.allclose(got, want, atol=1e-10) and not info.fell_back
    inputs = [x, *made.parameters()]
    for ours, theirs in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9)


def paper_slstm(x, R):
    """sLSTM's states y, c, n and m as in the xLSTM repository's vanilla form, one document from nothing. x: by name
    (t, h, k); R: by name (h, k, k)."""
    y = c = n = torch.zeros_like(x["i"][0])
    m, outputs = None, []
    for t in range(len(x["i"])):
        i, f, z, o = (x[name][t] + torch.einsum("hij,hj->hi", R[name], y) for name in "ifzo")
        log_f = F.logsigmoid(f)
        new = i if m is None else torch.maximum(i, log_f + m)
        i, f = torch.exp(i - new), torch.zeros_like(f) if m is None else torch.exp(log_f + m - new)
        m, c, n = new, f * c + i * torch.tanh(z), f * n + i
        y = torch.sigmoid(o) * c / n
        outputs.append(y)
    return torch.stack(outputs), (y, c / n, n.log() + m)


@pytest.mark.parametrize("scale", [1.0, 6.0], ids=["plain", "extreme gates"])
def test_slstm_is_the_papers(scale):
    """Documents of several lengths in one call: states go back to nothing where each begins. And on from a state."""
    made, lengths = cell(plait.SLSTM), (1, 70, 2, 30)
    made.in_proj.weight.data *= scale
    x = randn(1, sum(lengths), DIM).requires_grad_()
    named, R = parts(made, x)
    documents = [
        paper_slstm({name: v[0, a:b] for name, v in named.items()}, R)
        for a, b in Packing.of_lengths(lengths, torch.device("cpu")).bounds
    ]
    want = torch.cat([y for y, _ in documents])[None].flatten(2)
    state = torch.tensor([0.0, 0.0, EMPTY], dtype=torch.float64)[None, :, None, None].expand(4, 3, HEADS, K)
    got, final, _ = made(x, state, Packing.of_lengths(lengths, x.device))
    assert torch.allclose(got, want, atol=1e-10)
    assert torch.allclose(final, torch.stack([torch.stack(last) for _, last in documents]), atol=1e-9)
    inputs = [x, *made.parameters()]
    for ours, theirs in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-8)
    long = randn(1, 50, DIM)
    whole = made(long)[0]
    first, middle, _ = made(long[:, :20], state[:1])
    assert torch.allclose(torch.cat([first, made(long[:, 20:], middle)[0]], 1), whole, atol=1e-10)


def layer_of(config, **design):
    design = plait.ModelConfig(vocab=5, dim=DIM, pattern="X", layers={"X": config}, **design)
    return plait.build(design).place("X#0").double()


def test_layer_written_out():
    """A convolution, SiLU, the cell, and its norm times SiLU of a gate from the layer's input."""
    layer, x = layer_of(plait.GRU(heads=HEADS, head_dim=K)), randn(2, 20, DIM)
    layer.norm.weight.data = randn(HEADS * K)
    padded = F.pad(x, (0, 0, 3, 0)).mT
    u = F.conv1d(padded, layer.conv1d.weight[:, None], layer.conv1d.bias, groups=DIM).mT
    h = layer.cell(F.silu(u))[0]
    gate = F.silu(x @ layer.gate_proj.weight.T)
    want = F.rms_norm(h, (HEADS * K,), layer.norm.weight, eps=1e-6) * gate @ layer.out_proj.weight.T
    assert torch.allclose(layer(x, context_for(torch.zeros(2, 20, dtype=torch.long)), None)[0], want)
    bare = layer_of(plait.RNN(heads=HEADS, head_dim=K, conv_width=None, output_gate=False))
    want = bare.cell(x)[0] @ bare.out_proj.weight.T
    assert torch.allclose(bare(x, context_for(torch.zeros(2, 20, dtype=torch.long)), None)[0], want)


def test_configs_know_their_cells():
    """What a design says without torch is what the cells say."""
    assert shooting.EMPTY == EMPTY
    for kind in CELLS:
        for options in ({}, {"coupled": True}, {"peephole": True}, {"coupled": True, "peephole": True}):
            if set(options) <= set(kind.__struct_fields__):
                config = kind(**options)
                made = cell_of(config)
                assert config.sizes() == (len(made.inputs), len(made.states), len(made.weights))
                assert (config.start() or (0.0,) * len(made.states)) == made.start
                assert config.keeps is None or config.keeps[0] < len(made.inputs)


def test_first_biases_of_the_gate_that_keeps():
    for config, start in ((plait.GRU, -1.0), (plait.LSTM, 1.0), (plait.SLSTM, 1.0)):
        made = RecurrentCell(config(heads=2, head_dim=3, gate_bias=(0.0, 2.0)), 8)
        bias = made.in_proj.bias.view(-1, 2, 3)
        gate = config.keeps[0]
        assert torch.equal(bias[gate], start * torch.tensor([[0.0, 1.0, 2.0]] * 2))
        assert bias.count_nonzero() == 4
    with pytest.raises(ValueError, match="RNN has no gate that keeps"):
        plait.RNN(gate_bias=1.0)


def small(pattern, **layers):
    return plait.ModelConfig(vocab=11, dim=64, pattern=pattern, layers=layers)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_stats_by_address(checkpointing):
    """One entry per recurrent layer, inside branches and chains too, whether shared or not; nothing stays on modules."""
    design = small("G [A|SG]F G", G=plait.GRU(heads=2, head_dim=8, shared=True))
    model, tokens = plait.build(design), torch.arange(40)[None] % 11
    model.activation_checkpointing = checkpointing
    names = [list(module.__dict__) for module in model.modules()]
    sent = plait.Channels()
    model(tokens, channels=sent)[0].sum().backward()
    assert set(sent.stats) == {"G#0", "S#0", "G#1", "G#2"}
    for entry in sent.stats.values():
        info = entry["solver"]
        assert int(info.passes) >= 1 and float(info.gap) < 1e-5 and not info.fell_back
    assert [list(module.__dict__) for module in model.modules()] == names


def test_stats_from_a_compiled_graph():
    model, tokens = plait.build(small("G[H|A]", G=plait.GRU(heads=2, head_dim=8))), torch.arange(40)[None] % 11
    eager, compiled = plait.Channels(), plait.Channels()
    want = model(tokens, channels=eager)[0]
    torch.compiler.reset()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, channels=compiled)[0]
    torch.compiler.reset()
    assert torch.allclose(got, want, atol=1e-5)
    assert set(compiled.stats) == set(eager.stats) == {"G#0", "H#0"}
    for address, entry in compiled.stats.items():
        assert int(entry["solver"].passes) == int(eager.stats[address]["solver"].passes)


def test_solver_options_reach_the_op():
    x = 3 * randn(1, 200, DIM)
    made = cell(plait.RNN, max_passes=1, strict=True, recurrence="heads")
    made.R.data *= 8  # chaotic
    with pytest.raises(NotConverged, match="RNN"):
        made(x)
    loose = RecurrentCell(made.config.replace(strict=False), DIM).double()
    loose.load_state_dict(made.state_dict())
    exact = RecurrentCell(made.config.replace(strict=False, solver="sequential"), DIM).double()
    exact.load_state_dict(made.state_dict())
    got, _, info = loose(x)
    assert info.fell_back and torch.allclose(got, exact(x)[0])
    with pytest.raises(ValueError, match="GRU.solver: 'deer' does not exist; known: sequential, shooting"):
        plait.GRU(solver="deer")


@pytest.mark.parametrize(("products", "expected"), [("highest", "ieee"), ("high", "tf32")])
def test_a_fall_back_to_cudnn_rounds_as_products_do(monkeypatch, products, expected):
    """cuDNN's recurrences take TF32 for float32 unless told otherwise; both ways are seen through a stand-in here."""
    seen, call = [], torch.func.functional_call

    def record(*args):
        seen.append(torch.backends.cudnn.rnn.fp32_precision)
        return call(*args)

    monkeypatch.setattr(torch.func, "functional_call", record)
    made = cell(plait.LSTM, max_passes=1, recurrence="dense", gate_bias=6.0)
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.set_float32_matmul_precision(products)
    try:
        h, _, info = made(3 * randn(1, 200, DIM))
        h.sum().backward()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert info.fell_back and seen == [expected] * 2
    assert torch.backends.cudnn.rnn.fp32_precision == before
