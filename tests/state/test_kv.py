"""The append-only buffer behind full attention's states, against handles that simply keep copies."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, rule

from plait.state import KV, StaleState

ROWS, HEADS, K = 2, 1, 2


class Handles(RuleBasedStateMachine):
    """Any handle may be continued at any time. Beside each stands `truth`, a copy of what it should see, and `written`
    is what each buffer holds now: a handle is stale exactly when the two differ."""

    handles = Bundle("handles")

    def __init__(self):
        super().__init__()
        self.fresh = 0
        self.kept = []  # buffers, so that no id is given out twice
        self.written: dict[int, list[list[float]]] = {}  # buffer -> row -> value at each position

    def values(self, count: int) -> list[float]:
        self.fresh += count
        return [float(n) for n in range(self.fresh - count, self.fresh)]

    @rule(target=handles, room=st.integers(0, 5))
    def start(self, room):
        zeros = torch.zeros(ROWS, room, HEADS, K)
        handle = KV.of({"k": zeros, "v": -zeros}, (0,) * ROWS)
        self.holds(handle.buffer, [[], []])
        return handle, [[], []]

    def holds(self, buffer, rows):
        self.kept.append(buffer)
        self.written[id(buffer)] = [list(row) for row in rows]

    def stale(self, handle, truth) -> bool:
        now = self.written[id(handle.buffer)]
        return any(row[: len(seen)] != seen for row, seen in zip(now, truth, strict=True))

    @rule(target=handles, which=handles, counts=st.tuples(st.integers(1, 4), st.integers(1, 4)), grad=st.booleans())
    def extend(self, which, counts, grad):
        handle, truth = which
        new = [self.values(n) for n in counts]
        k = torch.tensor([x for row in new for x in row]).view(1, -1, 1, 1).expand(1, -1, HEADS, K).clone()
        rows = torch.tensor([r for r, n in enumerate(counts) for _ in range(n)])[None]
        at = torch.tensor([len(truth[r]) + i for r, n in enumerate(counts) for i in range(n)])[None]
        if counts[0] == counts[1] and len(truth[0]) == len(truth[1]):
            k, rows, at = k.view(ROWS, -1, HEADS, K), None, None
        k.requires_grad_(grad)
        grad = grad or handle.buffer.tensors["k"].requires_grad
        if self.stale(handle, truth):
            with pytest.raises(StaleState):
                handle.extend((k, -k), rows, at)
            return which
        after, (keys, values) = handle.extend((k, -k), rows, at)
        seen = [old + more for old, more in zip(truth, new, strict=True)]
        self.check(after, keys, values, seen)
        if grad:  # a buffer of its own
            assert after.buffer is not handle.buffer
            self.holds(after.buffer, seen)
            return after, seen
        assert after.buffer is handle.buffer
        for row, old, more in zip(self.written[id(handle.buffer)], truth, new, strict=True):
            row[len(old) : len(old) + len(more)] = more
        return after, seen

    def check(self, handle, keys, values, seen):
        assert handle.lengths == tuple(len(row) for row in seen)
        assert keys.shape[1] == max(handle.lengths)
        for row, expected in enumerate(seen):
            assert keys[row, : len(expected), 0, 0].tolist() == expected
            assert values[row, : len(expected), 0, 1].tolist() == [-x for x in expected]

    @rule(target=handles, which=handles)
    def fork(self, which):
        handle, truth = which
        if self.stale(handle, truth):
            with pytest.raises(StaleState):
                handle.map(torch.clone)
            return which
        copy = handle.map(torch.clone)
        self.check(copy, *(x[:, : max(copy.lengths)] for x in copy.buffer.tensors.values()), truth)
        self.holds(copy.buffer, truth)
        return copy, truth

    @rule(which=handles)
    def look(self, which):
        handle, truth = which
        if self.stale(handle, truth):
            with pytest.raises(StaleState):
                handle.check()
        else:
            handle.check()


Handles.TestCase.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
TestHandles = Handles.TestCase


def written(length: int, room: int = 0) -> KV:
    k = torch.arange(float(length)).view(1, -1, 1, 1)
    return KV.of({"k": torch.zeros(1, room, 1, 1), "v": torch.zeros(1, room, 1, 1)}, (0,)).extend((k, k), None, None)[0]


def test_growing_copies_seldom():
    handle, capacities = written(1), set()
    for _ in range(1000):
        handle, _ = handle.extend((torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)), None, None)
        capacities.add(handle.buffer.capacity)
    assert len(capacities) <= 6


def test_reserved_room_is_used():
    handle = written(3, room=10)
    assert handle.buffer.capacity == 10


def test_the_error_says_what_to_do():
    first = written(2)
    x = torch.ones(1, 1, 1, 1)
    draft, _ = first.extend((x, x), None, None)
    first.extend((x, x), None, None)
    with pytest.raises(StaleState, match=r"tokens per row: \[3\].*fork\(\)"):
        draft.extend((x, x), None, None)


def test_gradients_reach_earlier_keys():
    x = torch.ones(1, 2, 1, 1, requires_grad=True)
    handle = KV.of({"k": torch.zeros(1, 0, 1, 1), "v": torch.zeros(1, 0, 1, 1)}, (0,))
    after, _ = handle.extend((x, 2 * x), None, None)
    _, (keys, values) = after.extend((3 * x, x), None, None)
    (keys.sum() + values.sum()).backward()
    assert x.grad.flatten().tolist() == [7.0, 7.0]
