"""The gated delta rule (arXiv 2412.06464, eq. 10): S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T, o_t = S_t q_t."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from plait.ops import chunks_gpu, fla
from plait.ops.decay import decay_of
from plait.ops.delta import chunked, pooled, reference, step
from plait.ops.frame import Rows, recur
from plait.ops.gla import KERNELS as CHANNELS
from plait.ops.kernels import Kernel, Kernels, always, cast, one_token, wide
from plait.ops.packing import Packing
from plait.ops.rms_norm import l2norm
from plait.ops.summary import Summary, of_matrices
from plait.ops.token import held, linear

KERNELS = Kernels(
    "delta",
    (
        Kernel("triton", pooled.run, linear, rows=True),
        Kernel("chunks", chunks_gpu.run, chunks_gpu.fits),
        Kernel("step", step.run, one_token, wide=True),
        Kernel("chunked", chunked.run, always, wide=True),
        Kernel("fla", fla.delta, fla.fits_delta),
        Kernel("reference", reference.run, always, wide=True),
    ),
)


class Gates(NamedTuple):
    """A layer's way to the rule (arXiv 2412.06464, section 3.4): q and k of length 1, decays and strengths from projections."""

    A_log: Float[Tensor, " h"]
    dt_bias: Float[Tensor, "h *k"]  # per channel where decays are
    eps: float = 1e-6  # below which a length counts as 0
    most: float = 1.0  # the strength of a gate that is fully open

    def before(self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        A_log = self.A_log
        A = A_log.exp() if self.dt_bias.ndim == 1 else A_log.exp()[:, None]
        g = -A * F.softplus(cast(a, A_log.dtype) + self.dt_bias)
        if q.shape[1] == 1:  # half the small operations of a decoding step
            q, k = l2norm(torch.cat([q, k], 1), self.eps).split_with_sizes((1, 1), 1)
        else:
            q, k = l2norm(q, self.eps), l2norm(k, self.eps)
        beta = torch.sigmoid(cast(b, A_log.dtype))
        return q, k, v, g, beta if self.most == 1 else beta * self.most

    def after(self, y: Tensor, *inputs: Tensor) -> Tensor:
        return y


class Removal(NamedTuple):
    """The rule with a decay per key channel, for the forms of `plait.ops.gla` that know `dplr` alone."""

    gates: Gates | None

    def before(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        """q, k, v, g and p of `dplr`, which reads before the decay what the delta rule reads after it."""
        if self.gates is not None:
            q, k, v, g, beta = self.gates.before(q, k, v, g, beta)
        times, k, v, g, beta = v.shape[2] // k.shape[2], wide(k), wide(v), wide(g), wide(beta)[..., None]
        q, k = (x if times == 1 else x.repeat_interleave(times, 2) for x in (q, k))
        return q, k, beta * v, g, -beta * k * decay_of(g)

    def after(self, y: Tensor, *inputs: Tensor) -> Tensor:
        return y


def gated_delta(
    q: Float[Tensor, "b t g k"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t h v"],
    g: Float[Tensor, "b t h"] | Float[Tensor, "b t h k"],
    beta: Float[Tensor, "b t h"],
    *,
    scale: float | None = None,
    gates: Gates | None = None,
    state: Float[Tensor, "n h v k"] | None = None,
    rows: Rows | None = None,
    packing: Packing | None = None,
    at: Int[Tensor, " m"] | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "n h v k"] | None, *tuple[Float[Tensor, "b m h v k"], ...]]:
    """Outputs and, where a state was given, the state after the last token.

    g is the log decay, log a <= 0, of a head or of each key channel (Kimi delta attention, arXiv 2510.26692, eq. 1:
    S_t = S_{t-1} diag(a_t) (I - b_t k_t k_t^T) + b_t v_t k_t^T; it runs in the forms of `plait.ops.gla`). `g` key heads serve h
    value heads in order (h a multiple). Computed in float32, or float64 for float64 inputs. n is the batch, or the number of
    documents with `packing`. scale: on q, 1 if left out. With `gates`, g and beta come as the projections that those are made
    of. With `rows`, `state` is a pool's (`plait.ops.frame`). With `at`, numbers of tokens, the states after these come third.
    """
    inputs = (q, k, v, g, beta)
    kernels, sizes, around = KERNELS, chunks_gpu.sizes_of(k, v), gates
    if g.ndim == 4:
        kernels, around = CHANNELS, Removal(gates)
    elif rows is not None:
        sizes = held(state)
    return recur(kernels, v, inputs, state, rows, packing, scale=scale, at=at, sizes=sizes, around=around)


def summary(
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t h v"],
    g: Float[Tensor, "b t h"] | Float[Tensor, "b t h k"],
    beta: Float[Tensor, "b t h"],
) -> Summary:
    """What `gated_delta` of these tokens does to any state before them."""
    k, v = wide(k), wide(v)
    return of_matrices(lambda v, state: gated_delta(k, k, v, g, beta, state=state)[1], v, k.shape[3])  # type: ignore[arg-type,return-value]  # given a state, it gives one
