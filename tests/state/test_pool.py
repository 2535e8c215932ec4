"""Pools: what is refused and what is left behind. That they are the values they stand for is law 14."""

import random
from typing import Any

import pytest
import torch

import plait
from plait.engine import Sampling, generate_tokens
from plait.engine.step import Step
from plait.state import PoolFull, StaleState


def tiny(pattern="DF AF", **changes):
    layers = {"W": plait.Attention(window=5)} if "W" in pattern else {}
    return plait.build(
        plait.ModelConfig(vocab=61, dim=64, pattern=pattern, layers=layers, **changes), dtype=torch.float64
    )


def after(model, *lengths):
    from plait.state import ModelState

    with torch.no_grad():
        return ModelState.join([model(torch.arange(n)[None] % 61, model.init_state(1))[1] for n in lengths])


def everything(pool):
    state = [x.clone() for x in (*pool.tensors.values(), pool.starts, pool.table)]
    return state, list(pool.lengths), [list(t) for t in pool.tables], pool.free_rows, pool.free_pages


def unchanged(pool, before):
    tensors, *rest = everything(pool)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before[0], strict=True))
    assert rest == list(before[1:])


def test_a_pool_without_room_says_what_would_do_and_stays_as_it_was():
    model = tiny()
    pool = model.init_pool(2, 12, page=4, pages=4)
    rows = pool.join(after(model, 8, 6))
    before = everything(pool)
    with pytest.raises(
        PoolFull, match=r"no room for 1 rows: the pool has 2 rows \(0 free\).*rows=3, tokens=12, pages=9 would do"
    ):
        pool.join(after(model, 3))
    with pytest.raises(
        PoolFull, match=r"no room for 1 more pages.*4 pages of 4 \(0 free\).*pages=5 would do \(about [\d,]+ bytes"
    ):
        model(torch.zeros(2, 1, dtype=torch.long), pool.at(rows))
    with pytest.raises(PoolFull, match=r"no room for a sequence of 13 tokens.*tokens=13"):
        model(torch.zeros(1, 5, dtype=torch.long), pool.at(rows[:1]))
    unchanged(pool, before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda pool, model: pool.at([0, 0]), r"rows \[0, 0\]: a row can be given once"),
        (lambda pool, model: pool.leave([0, 0]), r"rows \[0, 0\]: a row can be given once"),
        (lambda pool, model: pool.leave([0, 1]), r"row 1 of the pool holds no sequence; those that do: \[0\]"),
        (lambda pool, model: pool.at([1]), r"row 1 of the pool holds no sequence; those that do: \[0\]"),
        (lambda pool, model: pool.at(torch.tensor([0, 0])), r"rows \[0, 0\]: a row can be given once"),
        (lambda pool, model: pool.leave(0), r"given as a sequence, such as \[0\]; got 0"),
        (lambda pool, model: pool.snapshot(0.0), "row 0.0 of the pool holds no sequence"),
        (lambda pool, model: pool.take([]), "take needs at least one row"),
        (lambda pool, model: pool.join(after(tiny("AF"), 3)), "the state of another design"),
        (lambda pool, model: pool.restore(0, _snapshot_of(tiny("AF"))), "the state of another design"),
        (lambda pool, model: pool.restore(0, _snapshot_of(model)), "this snapshot is of another pool"),
        (lambda pool, model: pool.join(_snapshot_of(model)), "this snapshot is of another pool"),
        (lambda pool, model: pool.truncate(0, 9), "row 0 has 7 tokens and cannot be cut to 9"),
        (lambda pool, model: pool.truncate(0, 3), r"row 0 cannot be cut to 3 tokens: .*slot 0.*\(it has none\)"),
        (
            lambda pool, model: tiny("AF")(torch.zeros(1, 1, dtype=torch.long), pool.at([0])),
            "this pool is another model's",
        ),
        (
            lambda pool, model: model(torch.zeros(2, 1, dtype=torch.long), pool.at([0])),
            "the call has 2 rows, but 1 rows of the",
        ),
        (lambda pool, model: model.init_pool(0, 4), "init_pool: rows must be a whole number"),
        (lambda pool, model: model.init_pool(2, 4, drafts=-1), "init_pool: drafts must be a whole number"),
    ],
)
def test_what_a_pool_refuses(wrong, message):
    model = tiny()
    pool = model.init_pool(3, 16, page=4)
    pool.join(after(model, 7))
    before = everything(pool)
    with pytest.raises(ValueError, match=message):
        wrong(pool, model)
    unchanged(pool, before)


@pytest.mark.parametrize("page", [None, 4])
def test_a_pool_lies_where_its_model_does_whatever_the_default_device_is(page):
    model = tiny("DF WF AF")
    state, new = after(model, 7, 5), torch.tensor([[1], [2]])

    def run():
        pool = model.init_pool(3, 24, page=page)
        rows = pool.join(state)
        with torch.no_grad():
            logits = [model(new, pool.at(rows))[0] for _ in range(3)]
        pool.leave(rows[:1])
        pool.join(pool.snapshot(rows[1]))
        return [*logits, *pool.take([0, 1]).tensors().values()]

    want = run()
    with torch.device("meta"):
        got = run()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_pool_refuses_keys_that_were_overwritten():
    model = tiny()
    pool, state = model.init_pool(3, 16, page=4), after(model, 7)
    with torch.no_grad():
        _, draft = model(torch.ones(1, 2, dtype=torch.long), state)
        model(torch.zeros(1, 2, dtype=torch.long), state)
    before = everything(pool)
    with pytest.raises(StaleState):
        pool.join(draft)
    unchanged(pool, before)


def _snapshot_of(model):
    pool = model.init_pool(1, 8)
    return pool.snapshot(pool.join(after(model, 3))[0])


def test_the_nearest_snapshot_is_named():
    model = tiny()
    pool = model.init_pool(1, 32)
    (row,) = pool.join(after(model, 4))
    kept = []
    for _ in range(3):
        kept.append(pool.snapshot(row))
        model(torch.zeros(1, 3, dtype=torch.long), pool.at([row]))
    with pytest.raises(ValueError, match="the nearest was taken at 7"):
        pool.truncate(row, 8)
    del kept[1]
    with pytest.raises(ValueError, match="the nearest was taken at 10"):
        pool.truncate(row, 8)


def test_attention_alone_is_cut_anywhere():
    model = tiny("AF")
    pool = model.init_pool(1, 32, page=4)
    (row,) = pool.join(after(model, 11))
    pool.truncate(row, 6)
    assert (pool.lengths[row], pool.free_pages) == (6, 6)
    want, _ = model(torch.tensor([[3]]), after(model, 6))
    got, _ = model(torch.tensor([[3]]), pool.at([row]))
    torch.testing.assert_close(got, want)


def test_pages_are_shared_until_somebody_writes_over_another():
    model = tiny("AF")
    pool = model.init_pool(3, 16, page=4)
    (row,) = pool.join(after(model, 10))
    taken = pool.snapshot(row)
    others = [*pool.join(taken), *pool.join(taken)]
    assert pool.free_pages == 12 - 3
    model(torch.tensor([[5]]), pool.at([row]))  # behind what the others see
    assert pool.free_pages == 12 - 3
    model(torch.tensor([[6]]), pool.at(others[:1]))  # where the first row has its 5
    assert pool.free_pages == 12 - 4  # the third page alone is copied
    _, want = model(torch.tensor([[5]]), after(model, 10))
    got = {name: x[:, :11] for name, x in pool.take([row]).tensors().items()}
    torch.testing.assert_close(got, {name: x[:, :11] for name, x in want.tensors().items()})
    pool.leave([row, *others])
    assert pool.free_pages == 12 - 3
    del taken
    assert pool.free_pages == 12


def test_rows_that_share_a_page_write_side_by_side():
    """Both in one call: each where the other would."""
    model = tiny("AF")
    pool, state = model.init_pool(2, 16, page=4), after(model, 6)
    (row,) = pool.join(state)
    rows = [row, *pool.join(pool.snapshot(row))]
    new = torch.tensor([[5, 7], [6, 8]])
    got = torch.cat([model(x, pool.at(rows))[0] for x in new.split(1, 1)], 1)
    torch.testing.assert_close(got, model(new, state.select([0, 0]))[0])


@pytest.mark.parametrize("pattern", ["W", "[W|A]"])
def test_windows_give_back_as_many_tokens_as_the_pool_was_made_for(pattern):
    model, read = tiny(pattern), torch.arange(17)[None]
    pool = model.init_pool(1, 32, page=4, drafts=3)
    (row,) = pool.join(after(model, 9))
    with pytest.raises(ValueError, match=r"slot 0 remembers goes back by 3 drafts alone.*or make the pool with more"):
        pool.truncate(row, 8)  # the value brought no more than it had
    model(read[:, 9:], pool.at([row]))
    with pytest.raises(ValueError, match="row 0 cannot be cut to 13 tokens"):
        pool.truncate(row, 13)
    for length in (16, 14):
        pool.truncate(row, length)
        want, _ = model(read[:, :1], after(model, length))
        got, _ = model(read[:, :1], pool.at([row]))
        torch.testing.assert_close(got, want)
        pool.truncate(row, length)


def test_a_model_that_reads_meta_tokens_begins_on_a_value():
    model = tiny("AF", front={"kind": "tokens", "meta": 3})
    pool = model.init_pool(1, 8)
    pool.join(model.init_state(1))
    with pytest.raises(ValueError, match="meta tokens cannot begin in a pool"):
        model(torch.tensor([[5]]), pool.at([0]))


def test_meta_tokens_are_not_cut_into():
    model = tiny("AF", front={"kind": "tokens", "meta": 3})
    pool = model.init_pool(1, 8)
    pool.join(after(model, 4))
    before = everything(pool)
    for length in (1, 2):
        with pytest.raises(ValueError, match=f"begins with 3 meta tokens and cannot be cut to {length} tokens"):
            pool.truncate(0, length)
    unchanged(pool, before)
    pool.truncate(0, 3)
    text = torch.tensor([[5, 6]])
    torch.testing.assert_close(model(text, pool.at([0]))[0], model(text)[0].detach())


def test_rows_may_come_in_a_tensor():
    """Who uses a page is known by numbers: two tensors of one number are two things to Python."""
    model = tiny()
    pool = model.init_pool(3, 16, page=4)
    pool.leave(pool.join(after(model, 1)))
    rows: Any = torch.tensor(pool.join(after(model, 7, 3)))
    for _ in range(6):
        model(torch.zeros(2, 1, dtype=torch.long), pool.at(rows))
    kept = pool.snapshot(rows[0])
    pool.restore(rows[1], kept)
    pool.leave(rows)
    del kept
    assert (pool.free_rows, pool.free_pages) == (3, 12)


@pytest.mark.parametrize("pattern", ["DF AF", "M"])
def test_a_row_that_has_left_is_not_written(pattern):
    model = tiny(pattern)
    pool = model.init_pool(2, 16, page=4)
    at = pool.at(pool.join(after(model, 3)))
    pool.leave([0])
    before = everything(pool)
    with pytest.raises(ValueError, match="row 0 of the pool holds no sequence"):
        model(torch.zeros(1, 1, dtype=torch.long), at)
    unchanged(pool, before)


@pytest.mark.parametrize("pattern", ["DF AF", "[M|W]F GF"])
def test_rows_that_come_and_go_write_what_they_write_alone(pattern):
    crowd(tiny(pattern), rows=6, steps=120, sampling=Sampling(temperature=1.5, top_p=0.95))


def crowd(model, rows, steps, sampling, length=48, page=8):
    """Texts that join and leave a pool at random, and are drafted ahead and cut back: each is what it is alone. Gives how many
    there were, and of how many tokens."""
    rng, texts, compared, tokens = random.Random(0), {}, 0, 0
    pool = model.init_pool(rows, length, page=page)
    step = Step(model, pool, [sampling] * rows, list(range(rows)))
    bytes_before = pool.nbytes
    with torch.inference_mode():
        for _ in range(steps):
            if pool.free_rows and rng.random() < 0.3:
                prompt = [rng.randrange(61) for _ in range(rng.randint(1, 9))]
                hidden, state = model.features(torch.tensor([prompt]), model.init_state(1))
                (row,) = pool.join(state)
                texts[row] = (prompt, step.choose(hidden[:, -1], pool.at([row])).tolist())
            live = [row for row in texts if pool.lengths[row] < length - 3 and rng.random() < 0.8]
            if live and rng.random() < 0.2:  # a draft of two tokens, taken back
                kept = pool.snapshot(live[0])
                model(torch.randint(61, (1, 2)), pool.at(live[:1]))
                pool.truncate(live[0], kept.length)
            if live:
                rng.shuffle(live)
                for row, token in zip(live, step(pool.at(live)).tolist(), strict=True):
                    texts[row][1].append(token)
            for row in [row for row in texts if pool.lengths[row] >= length - 3 or rng.random() < 0.03]:
                prompt, written = texts.pop(row)
                alone = sampling.replace(seed=row) if sampling.temperature else sampling
                assert generate_tokens(model, [prompt], max_tokens=len(written), sampling=alone) == [written]
                pool.leave([row])
                compared, tokens = compared + 1, tokens + len(written)
    pool.leave(list(texts))
    kept = None
    assert (pool.nbytes, pool.free_rows, pool.free_pages) == (bytes_before, rows, pool.pages)
    return compared, tokens
