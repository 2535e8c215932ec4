"""Unit lower triangular systems, as the delta rules have one in every chunk."""

import torch
from jaxtyping import Float
from torch import Tensor


def solve(A: Float[Tensor, "n c c"], B: Float[Tensor, "n c m"], transposed: bool = False) -> Float[Tensor, "n c m"]:
    """X = (I + A)^-1 B, or (I + A)^-T B, of A below its diagonal; B is lost.

    Given as X^T (I + A)^T = B^T, since the solver wants columns to be contiguous where our rows are: anything else costs
    copies, and a result that later products are slow on.
    """
    left, X = A if transposed else A.mT, B.mT
    place = None if torch.compiler.is_compiling() else X  # B's own memory saves most of the time; Dynamo refuses it
    return torch.linalg.solve_triangular(left, X, upper=not transposed, left=False, unitriangular=True, out=place).mT
