"""Linear recurrences with a decay per key channel: gated linear attention (arXiv 2312.06635, eq. 3), and with a removal."""

from jaxtyping import Float, Int
from torch import Tensor

from plait.ops import channels_gpu, fla
from plait.ops.chunks_gpu import sizes_of
from plait.ops.decay import decay_of
from plait.ops.frame import Rows, recur
from plait.ops.gla import chunked, reference, step
from plait.ops.kernels import Kernel, Kernels, always, full_precision, one_token, wide
from plait.ops.packing import Packing
from plait.ops.summary import Summary, of_matrices

KERNELS = Kernels(
    "gla",
    (
        Kernel("step", step.run, one_token, wide=True),
        Kernel("chunks", channels_gpu.run, channels_gpu.fits, around=True),
        Kernel("chunked", chunked.run, always, wide=True),
        Kernel("fla", fla.channels, fla.fits_channels, around=True),
        Kernel("reference", reference.run, always, wide=True),
    ),
)


def gla(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h v"],
    g: Float[Tensor, "b t h k"],
    *,
    scale: float | None = None,
    state: Float[Tensor, "n h v k"] | None = None,
    rows: Rows | None = None,
    packing: Packing | None = None,
    at: Int[Tensor, " m"] | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "n h v k"] | None, *tuple[Float[Tensor, "b m h v k"], ...]]:
    """Gated linear attention (arXiv 2312.06635, eq. 3): S_t = S_{t-1} diag(a_t) + v_t k_t^T, o_t = S_t q_t.

    Outputs and, where a state was given, the state after the last token. g is log a <= 0. Computed in float32, or float64 for
    float64 inputs. n is the batch, or the documents packed. scale: on q, 1 if left out. With `rows`, `state` is a pool's
    (`plait.ops.frame`). With `at`, numbers of tokens, the states after these come third.
    """
    return recur(KERNELS, v, (q, k, v, g), state, rows, packing, scale=scale, at=at, sizes=sizes_of(k, v))


def dplr(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h v"],
    g: Float[Tensor, "b t h k"],
    p: Float[Tensor, "b t h k"],
    z: Float[Tensor, "b t h k"] | None = None,
    *,
    scale: float | None = None,
    state: Float[Tensor, "n h v k"] | None = None,
    rows: Rows | None = None,
    packing: Packing | None = None,
    at: Int[Tensor, " m"] | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "n h v k"] | None, *tuple[Float[Tensor, "b m h v k"], ...]]:
    """Diagonal plus low rank (RWKV-7, arXiv 2503.14456, eq. 17): S_t = S_{t-1} (diag(a_t) + p_t z_t^T) + v_t k_t^T.

    What stands in the state along p is written along z; z left out is k, as in a delta rule, at half the cost. All else is as
    in `gla`.
    """
    removal = (p,) if z is None else (p, z)
    inputs = (q, k, v, g, *removal)
    return recur(KERNELS, v, inputs, state, rows, packing, scale=scale, at=at, sizes=channels_gpu.REMOVAL)


def summary(
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h v"],
    g: Float[Tensor, "b t h k"],
    p: Float[Tensor, "b t h k"] | None = None,
    z: Float[Tensor, "b t h k"] | None = None,
) -> Summary:
    """What `gla`, or with `p` `dplr`, of these tokens does to any state before them."""
    with full_precision(k.device):
        k, v, g = wide(k), wide(v), wide(g)
        if p is not None:
            return of_matrices(lambda v, state: dplr(k, k, v, g, p, z, state=state)[1], v, k.shape[3])  # type: ignore[arg-type,return-value]  # given a state, it gives one
        G = g.double().cumsum(1)
        to_end = decay_of((G[:, -1:] - G).to(g.dtype))
        final = v.permute(0, 2, 3, 1) @ (k * to_end).transpose(1, 2)  # (b, h, v, k)
        return Summary(decay_of(G[:, -1].to(g.dtype)), final)
