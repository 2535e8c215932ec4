"""State space duality (Mamba-2, arXiv 2405.21060, section 6): S_t = a_t S_{t-1} + v_t k_t^T, o_t = S_t q_t."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from plait.ops import chunks_gpu, fla
from plait.ops.decay import decay_of
from plait.ops.frame import Rows, recur
from plait.ops.kernels import Kernel, Kernels, always, cast, full_precision, one_token, wide
from plait.ops.packing import Packing
from plait.ops.ssd import chunked, pooled, reference, step
from plait.ops.summary import Summary
from plait.ops.token import held, linear

KERNELS = Kernels(
    "ssd",
    (
        Kernel("triton", pooled.run, linear, rows=True),
        Kernel("chunks", chunks_gpu.run, chunks_gpu.fits),
        Kernel("step", step.run, one_token, wide=True),
        Kernel("chunked", chunked.run, always, wide=True),
        Kernel("fla", fla.ssd, fla.fits_ssd),
        Kernel("reference", reference.run, always, wide=True),
    ),
)


class Gates(NamedTuple):
    """Mamba-2's way to the recurrence (arXiv 2405.21060, section 7): steps dt from a projection, held between `dt_min` and
    `dt_max`, and x past it by D."""

    A_log: Float[Tensor, " h"]
    dt_bias: Float[Tensor, " h"]
    D: Float[Tensor, " h"]
    dt_min: float = 0.0
    dt_max: float | None = None

    def before(self, C: Tensor, B: Tensor, x: Tensor, dt: Tensor) -> tuple[Tensor, ...]:
        dt = F.softplus(cast(dt, self.dt_bias.dtype) + self.dt_bias)  # (b, t, h)
        if self.dt_min or self.dt_max is not None:
            dt = dt.clamp(self.dt_min, self.dt_max)
        return C, B, x * cast(dt[..., None], x.dtype), -self.A_log.exp() * dt

    def after(self, y: Tensor, C: Tensor, B: Tensor, x: Tensor, dt: Tensor) -> Tensor:
        return torch.addcmul(y, x, cast(self.D[:, None], x.dtype))


def ssd(
    q: Float[Tensor, "b t g k"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t h v"],
    g: Float[Tensor, "b t h"],
    *,
    scale: float | None = None,
    gates: Gates | None = None,
    state: Float[Tensor, "n h v k"] | None = None,
    rows: Rows | None = None,
    packing: Packing | None = None,
    at: Int[Tensor, " m"] | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "n h v k"] | None, *tuple[Float[Tensor, "b m h v k"], ...]]:
    """Outputs and, where a state was given, the state after the last token.

    In Mamba-2's letters q is C, k is B, v is dt x and g = dt A, the log decay, one per head. `g` groups of q and k serve
    h heads in order (h a multiple). Computed in float32, or float64 for float64 inputs. n is the batch, or the documents
    packed. scale: on q, 1 if left out. With `gates`, v is x and g the projection that dt is made of. With `rows`, `state` is
    a pool's (`plait.ops.frame`). With `at`, numbers of tokens, the states after these come third.
    """
    sizes = held(state) if rows is not None else chunks_gpu.sizes_of(k, v)
    return recur(KERNELS, v, (q, k, v, g), state, rows, packing, scale=scale, at=at, sizes=sizes, around=gates)


def summary(k: Float[Tensor, "b t g k"], v: Float[Tensor, "b t h v"], g: Float[Tensor, "b t h"]) -> Summary:
    """What `ssd` of these tokens does to any state before them: one product over all of them, no loop."""
    with full_precision(k.device):
        k, v, g = wide(k), wide(v), wide(g)
        G = g.double().cumsum(1)  # as in `chunk_decay`: large sums would lose the gentle steps
        to_end = decay_of((G[:, -1:] - G).to(g.dtype))
        written = (v * to_end[..., None]).unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 4, 1)  # (b, g, h/g, v, t)
        final = written.flatten(2, 3) @ k.transpose(1, 2)
        return Summary(decay_of(G[:, -1].to(g.dtype)), final.view(v.shape[0], *v.shape[2:], k.shape[3]))
