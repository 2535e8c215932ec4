"""Recurrences by the chunked kernels of flash-linear-attention (fla), where `PLAIT_KERNELS` asks for them.

Its functions take what ours take: log decays, strengths, documents by offsets, key heads that serve several value heads. Its
states are float32 (n, h, k, v). A compiled graph breaks at them.
"""

import re
from importlib import util
from pkgutil import resolve_name

from torch import Tensor

from plait.ops import channels_gpu, chunks_gpu
from plait.ops.kernels import Call, wide
from plait.ops.packing import Packing

INSTALL = "pip install 'plait[fla]'"
HOPPER = (9, 0)  # its compute capability
WRONG = (3, 4), (3, 7, 1)  # Triton from, and before, with which fla 0.6.0 holds some gradients to be wrong on Hopper


def fits_ssd(call: Call) -> str | None:
    """None, or why `ssd` does not fit."""
    return _fits(call) or _gradients(call, "ssd")


def fits_delta(call: Call) -> str | None:
    """None, or why `delta` does not fit."""
    return _fits(call) or _gradients(call, "delta")


def fits_channels(call: Call) -> str | None:
    """None, or why `channels` does not fit."""
    if call.device == "cuda" and call.sizes == channels_gpu.REMOVAL:
        return "removes along keys alone"
    return _fits(call)


def _fits(call: Call) -> str | None:
    reason = chunks_gpu.fits(call)
    if reason is None and call.pooled:
        return "knows no rows of a pool"
    return reason or _not_installed()


def _not_installed() -> str | None:
    return None if util.find_spec("fla") else f"flash-linear-attention is not installed: {INSTALL}"


def _gradients(call: Call, op: str) -> str | None:
    """What fla's own check says halfway through a backward pass. TileLang's kernels, which it takes then, have no states in
    float32, as `ssd` keeps them."""
    if not call.gradients or call.architecture != HOPPER:
        return None
    version = _triton()
    if not WRONG[0] <= version < WRONG[1] or (op == "delta" and _tilelang()):
        return None
    return f"fla refuses its gradients with Triton 3.4 to 3.7.0 on Hopper, as wrong: {op}=chunks has them"


def _triton() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", resolve_name("triton:__version__"))[:3])


def _tilelang() -> bool:
    return util.find_spec("tilelang") is not None


def ssd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    state: Tensor | None,
    packing: Packing | None,
    own: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in `plait.ops.ssd`."""
    times = v.shape[2] // k.shape[2]
    q, k = (x if times == 1 else x.repeat_interleave(times, 2) for x in (q, k))
    return _call("simple_gla:chunk_simple_gla", (q, k, v), (g,), state, packing, scale)


def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None,
    packing: Packing | None,
    own: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in `plait.ops.delta`, one decay a head."""
    return _call("gated_delta_rule:chunk_gated_delta_rule", (q, k, v), (g, beta), state, packing, scale)


def channels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    *,
    state: Tensor | None,
    packing: Packing | None,
    own: bool = False,
    scale: float = 1.0,
    gates: channels_gpu.Gates | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in `plait.ops.gla` and, with `beta`, in `gated_delta` with a decay per channel, whose `gates` it takes too."""
    if beta is None:
        return _call("gla:chunk_gla", (q, k, v), (g,), state, packing, scale)
    if gates is not None:
        q, k, v, g, beta = gates.before(q, k, v, g, beta)
    return _call("kda:chunk_kda", (q, k, v), (g, beta), state, packing, scale)


def _call(
    name: str,
    tokens: tuple[Tensor, Tensor, Tensor],
    gates: tuple[Tensor, ...],
    state: Tensor | None,
    packing: Packing | None,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """A function of `fla.ops`: q, k and v in the dtype of v, gates in float32. A scale left out would be another than ours."""
    q, k, v = (x.to(tokens[2].dtype) for x in tokens)
    y, last = resolve_name(f"fla.ops.{name}")(
        q,
        k,
        v,
        *map(wide, gates),
        scale=scale,
        initial_state=None if state is None else state.float().mT.contiguous(),
        output_final_state=state is not None,
        cu_seqlens=None if packing is None else packing.cuts,
        cu_seqlens_cpu=None if packing is None else packing.cu_seqlens,
    )
    return y, None if state is None else last.mT.to(state.dtype).contiguous()
