"""The forms "fla" hand each op to flash-linear-attention as that documents its functions, and say where they do not fit.

A stand-in takes its place: float64 loops with its documented shapes, scale and layout of states. Its kernels are held on a GPU
by benchmarks/ops_gpu.py.
"""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from plait.ops import chunks_gpu, delta, fla, gla, ssd
from plait.ops.channels_gpu import REMOVAL
from plait.ops.kernels import Call, Kernel, Kernels, always, explain, forced
from tests.ops.conftest import packing, run_with_gradients

H, G, K, V, DOCUMENTS = 4, 2, 6, 5, (3, 1, 9)
TRAINING = Call("cuda", torch.bfloat16, "many", gradients=True, architecture=(9, 0))
FORWARD = TRAINING._replace(gradients=False)


def loop(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu):
    """As documented: q and k (b, t, h, k), v (b, t, h, v), g of heads or channels, states (n, h, k, v); beta: a delta rule."""
    heads = v.shape[2]
    q, k = (x.repeat_interleave(heads // x.shape[2], 2).double() for x in (q, k))
    v, g = v.double(), g.double() if g.ndim == 4 else g.double()[..., None]
    if cu_seqlens is None:
        rows = [(row, 0, v.shape[1]) for row in range(v.shape[0])]
    else:
        assert v.shape[0] == 1
        assert cu_seqlens.tolist() == cu_seqlens_cpu.tolist()
        cuts = cu_seqlens.tolist()
        rows = [(0, start, end) for start, end in zip(cuts, cuts[1:], strict=False)]
    outputs, finals = [], []
    for n, (row, start, end) in enumerate(rows):
        S = q.new_zeros(heads, q.shape[3], v.shape[3]) if initial_state is None else initial_state[n].double()
        for t in range(start, end):
            S = S * g[row, t].exp()[..., None]
            written = v[row, t]
            if beta is not None:
                written = beta[row, t, :, None].double() * (written - torch.einsum("hk,hkv->hv", k[row, t], S))
            S = S + torch.einsum("hk,hv->hkv", k[row, t], written)
            outputs.append(torch.einsum("hk,hkv->hv", scale * q[row, t], S))
        finals.append(S)
    o = torch.stack(outputs).view(v.shape)
    return o, torch.stack(finals) if output_final_state else None


def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, **call):
    assert q.shape == k.shape
    assert q.shape[2] == v.shape[2] == g.shape[2]
    assert g_gamma is None
    return loop(q, k, v, g, None, k.shape[-1] ** -0.5 if scale is None else scale, **call)


def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, **call):
    assert q.shape == k.shape
    assert g.shape == beta.shape == v.shape[:3]
    return loop(q, k, v, g, beta, k.shape[-1] ** -0.5 if scale is None else scale, **call)


def chunk_gla(q, k, v, g, scale=None, **call):
    assert q.shape == k.shape == g.shape
    assert call["initial_state"] is None or call["initial_state"].dtype == torch.float32
    return loop(q, k, v, g, None, k.shape[-1] ** -0.5 if scale is None else scale, **call)


def chunk_kda(q, k, v, g, beta, scale=None, **call):
    assert q.shape == k.shape
    assert g.shape == (*v.shape[:3], k.shape[3])
    assert beta.shape == v.shape[:3]
    assert call["initial_state"] is None or call["initial_state"].dtype == torch.float32
    return loop(q, k, v, g, beta, k.shape[-1] ** -0.5 if scale is None else scale, **call)


@pytest.fixture
def stand_in(monkeypatch):
    """Documented functions where fla has them; and forms that a CPU, too, may be forced to."""
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    places = {
        "simple_gla": chunk_simple_gla,
        "gated_delta_rule": chunk_gated_delta_rule,
        "gla": chunk_gla,
        "kda": chunk_kda,
    }
    for name, function in places.items():
        module = ModuleType(f"fla.ops.{name}")
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for op in (ssd, delta, gla):
        taken = [Kernel(x.name, x.run, always, around=x.around) for x in op.KERNELS.forms if x.name == "fla"]
        others = [x for x in op.KERNELS.forms if x.name != "fla"]
        monkeypatch.setattr(op, "KERNELS", Kernels(op.KERNELS.op, (*taken, *others)))
    monkeypatch.setattr(delta, "CHANNELS", gla.KERNELS)


def problem(name, t, dtype=torch.float64):
    generator = torch.Generator().manual_seed(t)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    b, groups = (1 if t == sum(DOCUMENTS) else 2), H if name == "gla" else G
    channels = (K,) if name in ("gla", "kda") else ()
    given = {
        "q": randn(b, t, groups, K),
        "k": F.normalize(randn(b, t, groups, K), dim=-1),
        "v": randn(b, t, H, V),
        "g": F.logsigmoid(randn(b, t, H, *channels)),
    }
    if name in ("delta", "kda"):
        given["beta"] = torch.sigmoid(randn(b, t, H))
    given = {name: x.to(dtype) for name, x in given.items()}
    return given, randn(len(DOCUMENTS) if b == 1 else b, H, V, K)


OP = {"ssd": ssd.ssd, "delta": delta.gated_delta, "gla": gla.gla, "kda": delta.gated_delta}


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("name", OP)
def test_it_is_the_reference(name, documents, has_state, scale, close):
    given, state = problem(name, 7 if documents is None else sum(documents))
    tensors = given | ({"state": state} if has_state else {})
    packed = None if documents is None else packing(documents)

    def run(form):
        def call(q, k, v, g, beta=None, state=None):
            inputs = (q, k, v, g) if beta is None else (q, k, v, g, beta)
            with forced(form):
                return OP[name](*inputs, scale=scale, state=state, packing=packed)

        return run_with_gradients(call, tensors)

    close.tolerance = 1e-6  # states are float32 on their way
    got, want = run("fla"), run("reference")
    assert got.keys() == want.keys()
    for part, x in want.items():
        close(got[part], x)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", ["delta", "kda"])
def test_gates_are_before_it(name, close):
    given, state = problem(name, 7)
    gates = delta.Gates(torch.rand(H), torch.rand(H, K) if name == "kda" else torch.rand(H))

    def run(form):
        with forced(form):
            return OP[name](*given.values(), gates=gates, state=state)

    close.tolerance = 1e-6
    for got, want in zip(run("fla"), run("reference"), strict=True):
        close(got, want)


@pytest.mark.usefixtures("stand_in")
def test_what_it_is_handed(monkeypatch):
    """16 bits for tokens, float32 for gates and states, whatever the model's are; the state comes back as it was."""
    seen = {}

    def watched(q, k, v, g, beta, **call):
        seen.update(q=q, k=k, v=v, g=g, beta=beta, **call)
        return chunk_gated_delta_rule(q, k, v, g, beta, **call)

    monkeypatch.setattr(sys.modules["fla.ops.gated_delta_rule"], "chunk_gated_delta_rule", watched)
    given, state = problem("delta", sum(DOCUMENTS), torch.bfloat16)
    documents = packing(DOCUMENTS)
    with forced("fla"):
        y, last = delta.gated_delta(*given.values(), state=state.bfloat16(), packing=documents)
    assert {seen[x].dtype for x in "qkv"} == {torch.bfloat16}
    assert {seen[x].dtype for x in ("g", "beta", "initial_state")} == {torch.float32}
    assert seen["initial_state"].shape == (len(DOCUMENTS), H, K, V)
    assert seen["initial_state"].is_contiguous()
    assert seen["scale"] == 1
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.bfloat16)
    assert last.shape == state.shape
    assert last.is_contiguous()


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(fla, "_not_installed", lambda: None)
    monkeypatch.setattr(fla, "_triton", lambda: (3, 6, 0))
    monkeypatch.setattr(fla, "_tilelang", lambda: False)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu"}, "needs an NVIDIA GPU"),
        ({"dtype": torch.float32}, "computes in 16 bits, the inputs are torch.float32"),
        ({"architecture": (7, 5)}, "needs compute capability 8.0, this is 7.5"),
        ({"tokens": "one"}, "only for several tokens"),
        ({"at": True}, "gives no states after chosen tokens"),
        ({"pooled": True}, "knows no rows of a pool"),
        ({"sizes": chunks_gpu.Sizes(128, 512)}, "heads of 512 are above 256"),
        ({"packed": True, "sizes": chunks_gpu.Sizes(128, 256)}, None),
    ],
)
def test_it_says_why_not(change, reason):
    for fits in (fla.fits_ssd, fla.fits_delta, fla.fits_channels):
        assert fits(FORWARD._replace(**change)) == reason


def test_a_removal_along_another_vector_is_refused():
    assert fla.fits_channels(TRAINING._replace(sizes=REMOVAL)) == "removes along keys alone"


def test_not_installed(monkeypatch):
    monkeypatch.setattr(fla.util, "find_spec", lambda name: None)
    reason = "flash-linear-attention is not installed: pip install 'plait[fla]'"
    for fits in (fla.fits_ssd, fla.fits_delta, fla.fits_channels):
        assert fits(TRAINING) == reason
    assert dict(explain(gla.KERNELS, TRAINING))["fla"] == reason


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("version", [(3, 3, 1), (3, 4, 0), (3, 6, 0), (3, 7, 0), (3, 7, 1), (3, 8)])
def test_gradients_that_it_refuses_itself(monkeypatch, version):
    monkeypatch.setattr(fla, "_triton", lambda: version)
    refused = (3, 4) <= version < (3, 7, 1)
    for fits, op in ((fla.fits_ssd, "ssd"), (fla.fits_delta, "delta")):
        assert fits(FORWARD) is None
        assert fits(TRAINING._replace(architecture=(8, 0))) is None
        reason = fits(TRAINING)
        assert (reason is not None) == refused
        assert reason is None or reason.endswith(f": {op}=chunks has them")
    assert fla.fits_channels(TRAINING) is None
    monkeypatch.setattr(fla, "_tilelang", lambda: True)
    assert fla.fits_delta(TRAINING) is None
    assert (fla.fits_ssd(TRAINING) is not None) == refused


def test_versions_are_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    monkeypatch.setattr(sys.modules["triton"], "__version__", "3.7.1+git1a2b", raising=False)
    assert fla._triton() == (3, 7, 1)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("op", [ssd, delta, gla])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("tokens", ["one", "few", "many"])
def test_it_is_never_chosen_by_itself(op, device, tokens):
    architecture = (8, 0) if device == "cuda" else None
    for dtype in (torch.float32, torch.bfloat16):
        rows = explain(op.KERNELS, Call(device, dtype, tokens, architecture=architecture))
        assert not dict(rows)["fla"].startswith("used")
