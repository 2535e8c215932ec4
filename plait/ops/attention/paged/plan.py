"""How one call of paged attention is cut into programs. Nothing here follows lengths or the batch, so that a row's bits do
not depend on who else is there, and one captured graph serves all lengths."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from plait.ops.numbers import power_of_two

WAVES = 2  # programs per multiprocessor that a single row's keys are cut into
MOST = 128  # splits: what more of them save, joining costs
TILE = 16 * 1024  # numbers of a tile of keys, where no registers are short

_force: dict[str, int] = {}


class Plan(NamedTuple):
    """BM: queries of a program, heads and tokens together. BN: keys of a step. splits: parts of a row's keys."""

    BM: int
    BN: int
    splits: int
    num_warps: int = 4
    STAGES: int = 3  # with a table, whose entries are a stage of their own


@contextmanager
def forced_plan(**sizes: int) -> Iterator[None]:
    """Run every call inside with these sizes."""
    global _force
    before, _force = _force, sizes
    try:
        yield
    finally:
        _force = before


def plan(queries: int, groups: int, head: int, itemsize: int, keys: int, table: bool, sms: int) -> Plan:
    """queries: of a group of heads. groups: heads of keys. head: the larger size of a key and a value. keys: how many may be
    visible at most, whatever the lengths."""
    BM = min(64, max(16, power_of_two(queries)))
    short = (BM > 16) + (power_of_two(head) > 128) + 2 * (itemsize > 2)  # of registers
    BN = max(16, min(128, (TILE >> short) // power_of_two(head)))
    chosen = Plan(BM, BN, 1, STAGES=3 if table else 2)._replace(**_force)
    programs = groups * -(-queries // chosen.BM)
    splits = min(-(-keys // chosen.BN), -(-WAVES * sms // programs), MOST)
    return chosen if "splits" in _force else chosen._replace(splits=max(1, splits))
