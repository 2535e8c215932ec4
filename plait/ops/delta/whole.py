"""A gated DeltaNet layer between its projections, for a single token on the rows of a pool: one kernel where the convolution,
the delta rule and the norm would be one each."""

import torch
from jaxtyping import Float
from torch import Tensor

from plait.ops import conv, delta
from plait.ops.frame import Rows
from plait.ops.kernels import choose
from plait.ops.operator import operator
from plait.ops.token import few_rows, held

LARGEST = 128 * 256  # numbers of a head's state, which a program holds in registers


def fits(x: Float[Tensor, "b t d"], state: Tensor, tails: Tensor, weight: Tensor) -> bool:
    """Whether both ops would run in their kernels for rows of a pool, and a head's state is small enough."""
    if x.shape[1] != 1 or not few_rows(x, widest=2**17) or state.shape[-1] * state.shape[-2] > LARGEST:
        return False
    sizes = conv.pooled.sizes_of(tails, weight)
    forms = choose(conv.KERNELS, x, pooled=True, sizes=sizes), choose(delta.KERNELS, x, pooled=True, sizes=held(state))
    return all(form.name == "triton" for form in forms)


def run(
    x: Float[Tensor, "b 1 d"],
    z: Float[Tensor, "b 1 h*v"],
    b: Float[Tensor, "b 1 h"],
    a: Float[Tensor, "b 1 h"],
    *,
    weight: Float[Tensor, "d w"],
    gates: "delta.Gates",
    norm: Float[Tensor, " v"],
    norm_eps: float,
    state: Float[Tensor, "n h v k"],
    tails: Float[Tensor, "n w-1 d"],
    rows: Rows,
) -> Float[Tensor, "b 1 h v"]:
    """rms_norm(o) silu(z), where o are the outputs of the delta rule on silu(conv(x)), whose d channels are q, k and v. `state`
    and `tails` are a pool's, of which `rows` are moved on."""
    index = None if isinstance(rows, slice) else rows
    if isinstance(rows, slice):
        state, tails = state[rows], tails[rows]
    return _step(
        x, z, b, a, weight.contiguous(), gates.A_log, gates.dt_bias, norm, state, tails, index, gates.eps, gates.most, norm_eps
    )  # fmt: skip


@operator("gated_delta_layer", mutates=("state", "tails"))
def _step(
    x: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm: Tensor,
    state: Tensor,
    tails: Tensor,
    rows: Tensor | None,
    eps: float,
    most: float,
    norm_eps: float,
) -> Tensor:
    from plait.ops.delta import whole_triton

    out = x.new_empty(len(x), 1, *state.shape[1:3])
    whole_triton.run(x, z, b, a, weight, A_log, dt_bias, norm, state, tails, rows, out, eps, most, norm_eps)
    return out


@torch.library.register_fake("plait::gated_delta_layer")
def _(x, z, b, a, weight, A_log, dt_bias, norm, state, tails, rows, eps, most, norm_eps):
    return x.new_empty(len(x), 1, *state.shape[1:3])
