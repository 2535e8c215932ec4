"""Law 14: a pool is the values it stands for, whoever joins, leaves, is copied or cut back meanwhile."""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from plait.design.model import ModelConfig
from plait.evaluate.laws.compare import LawBroken, agree, contents, some_tokens, subject
from plait.model import LanguageModel
from plait.state import ModelState, Pool, Snapshot

ROWS, LENGTH, OPERATIONS = 4, 64, 60
DRAFTS = 5  # tokens that windows can give back; a step is no longer


@dataclass(eq=False)
class _Row:
    """A row of the pool beside the value that it must equal, the snapshots taken of both, the values before each step since
    it was last put there as a whole, and the most tokens that it had since."""

    state: ModelState
    before: list[ModelState] = field(default_factory=list)
    reached: int = 0
    taken: list[tuple[Snapshot, ModelState]] = field(default_factory=list)


class _Story:
    """Rows of one model, in a pool and as values; every operation is done to both."""

    def __init__(self, model: LanguageModel, pool: Pool, seed: int):
        self.model, self.pool, self.random = model, pool, random.Random(seed)
        self.rows: dict[int, _Row] = {}
        self.worst, self.fresh = 0.0, seed

    def tokens(self, rows: int, count: int) -> Tensor:
        self.fresh += 1
        device = str(self.model.device)
        return torch.stack([some_tokens(self.model.design, count, device, seed=self.fresh + i) for i in range(rows)])

    def join(self) -> None:
        lengths = [self.random.randint(1, 9) for _ in range(self.random.randint(1, 2))]
        if len(lengths) > self.pool.free_rows:
            return
        states = [self.model(self.tokens(1, n), self.model.init_state(1))[1] for n in lengths]
        for row, state in zip(self.pool.join(ModelState.join(states)), states, strict=True):
            self.rows[row] = _Row(state)

    def leave(self) -> None:
        row = self.random.choice(list(self.rows))
        self.pool.leave([row])
        del self.rows[row]

    def step(self) -> None:
        """Some rows, in any order, read one token or a few."""
        rows = self.random.sample(list(self.rows), self.random.randint(1, len(self.rows)))
        count = self.random.choice((1, 1, 1, 2, 5))
        rows = [row for row in rows if self.pool.lengths[row] + count <= LENGTH]
        if not rows:
            return
        tokens = self.tokens(len(rows), count)
        got, _ = self.model(tokens, self.pool.at(rows))
        for i, row in enumerate(rows):
            here = self.rows[row]
            here.before.append(here.state.fork())
            want, here.state = self.model(tokens[i : i + 1], here.state)
            here.reached = max(here.reached, here.state.lengths[0])
            self.worst = max(self.worst, agree("pool", f"row {row}, a step of {count}", {"": got[i]}, {"": want[0]}))

    def snapshot(self) -> None:
        row = self.random.choice(list(self.rows))
        self.rows[row].taken.append((self.pool.snapshot(row), self.rows[row].state.fork()))

    def go_back(self) -> None:
        """Cut back to a snapshot, or restore it, or let another row begin with it."""
        row = self.random.choice(list(self.rows))
        if not self.rows[row].taken:
            return
        taken, state = self.random.choice(self.rows[row].taken)
        how = self.random.choice(("truncate", "restore", "join"))
        if how == "join":
            if self.pool.free_rows:
                (other,) = self.pool.join(taken)
                self.rows[other] = _Row(state.fork())
            return
        if how == "truncate":
            self.pool.truncate(row, taken.length)
        else:
            self.pool.restore(row, taken)
        self.rows[row].state, self.rows[row].before, self.rows[row].reached = state.fork(), [], taken.length
        self.rows[row].taken = [pair for pair in self.rows[row].taken if pair[0].length <= taken.length]

    def cut(self) -> None:
        """Take back some of the last tokens, without a snapshot."""
        row = self.random.choice(list(self.rows))
        here = self.rows[row]
        near = [i for i, state in enumerate(here.before) if state.lengths[0] >= here.reached - DRAFTS]
        if near:
            i = self.random.choice(near)
            here.state, here.before = here.before[i], here.before[:i]
            length = here.state.lengths[0]
            self.pool.truncate(row, length)
            here.taken = [pair for pair in here.taken if pair[0].length <= length]

    def check(self) -> None:
        for row, beside in self.rows.items():
            if self.pool.lengths[row] != beside.state.lengths[0]:
                raise LawBroken("pool", f"row {row} has {self.pool.lengths[row]} tokens, not {beside.state.lengths[0]}")
            got, want = contents(self.pool.take([row])), contents(beside.state)
            self.worst = max(self.worst, agree("pool", f"what row {row} holds", got, want))


@torch.no_grad()
def pool(design: ModelConfig, device: str, dtype: torch.dtype) -> float:
    """14: rows that join, leave, are paged, copied and cut back in any order give what each gives alone."""
    model = subject(design, device, dtype)
    worst = 0.0
    for seed, page in enumerate((None, 5)):
        story = _Story(model, model.init_pool(ROWS, LENGTH, page=page, drafts=0 if page is None else DRAFTS), seed)
        forgets = page is not None and all(leaf.keep == "all" or leaf.ring for leaf in story.pool.leaves.values())
        for _ in range(OPERATIONS):
            names = [
                "join",
                *(["step"] * 4 + ["snapshot", "go_back", "leave"] + ["cut"] * forgets if story.rows else []),
            ]
            getattr(story, story.random.choice(names))()
        story.check()
        worst = max(worst, story.worst)
        for row in story.rows.values():
            row.taken.clear()
        story.pool.leave(list(story.rows))
        if (story.pool.free_rows, story.pool.free_pages) != (ROWS, story.pool.pages):
            raise LawBroken("pool", "rows have left, but not all of their room is free")
    return worst
