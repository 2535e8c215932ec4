"""The laws every layer, merge and pattern keeps on every device. `tests/laws.py` and `plait selfcheck` run them."""

from collections.abc import Callable

import torch

from plait.design.model import ModelConfig
from plait.evaluate.laws.calls import causal, fast, packed, padded, split
from plait.evaluate.laws.compare import TOLERANCES as TOLERANCES
from plait.evaluate.laws.compare import LawBroken as LawBroken
from plait.evaluate.laws.designs import DESIGNS as DESIGNS
from plait.evaluate.laws.designs import small as small
from plait.evaluate.laws.generation import greedy
from plait.evaluate.laws.models import compiled, counts, files, surgery
from plait.evaluate.laws.models import packages as packages
from plait.evaluate.laws.pool import pool
from plait.evaluate.laws.solver import solver
from plait.evaluate.laws.states import fork, rollback, spec

Law = Callable[[ModelConfig, str, torch.dtype], float]

# each gives the largest relative error it met, or raises LawBroken
LAWS: dict[str, Law] = {
    "causal": causal,
    "split": split,
    "packed": packed,
    "padded": padded,
    "fast": fast,
    "rollback": rollback,
    "fork": fork,
    "spec": spec,
    "files": files,
    "counts": counts,
    "compiled": compiled,
    "solver": solver,
    "pool": pool,
    "surgery": surgery,
    "greedy": greedy,
}

EXACT = ("spec", "files", "counts", "packages", "surgery")  # laws without a tolerance: equal, or broken
