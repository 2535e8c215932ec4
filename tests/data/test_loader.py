"""Laws of the loader, over shards whose ids are their own places: id + 1 is the next token."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.data import ByteTokenizer, DataError, Loader, prepare

corpora = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 1)), min_size=2, max_size=12).filter(
    lambda documents: {side for _, side in documents} == {0, 1}
)
shapes = {"batch": st.integers(1, 4), "length": st.integers(1, 17)}
orders = st.sampled_from(["shuffled", "sequential"])
splits = st.sampled_from(["train", "heldout"])


def spans(corpus, split):
    """(start, end) of the split's documents."""
    ends = list(itertools.accumulate(length for length, _ in corpus))
    chosen = ["train", "heldout"].index(split)
    return [(end - length, end) for (length, side), end in zip(corpus, ends, strict=True) if side == chosen]


def equal(a, b):
    return (
        torch.equal(a.inputs, b.inputs)
        and torch.equal(a.targets, b.targets)
        and torch.equal(a.cu_seqlens, b.cu_seqlens)
        and a.bytes == b.bytes
    )


@settings(deadline=None)
@given(corpus=corpora, split=splits, order=orders, seed=st.integers(0, 9), **shapes)
def test_every_token_once_an_epoch_and_no_target_of_another_document(
    counting_shards, pieces, corpus, split, order, seed, batch, length
):
    shards = counting_shards(*map(list, zip(*corpus, strict=True)))
    ours = spans(corpus, split)
    epochs = 2
    loader = Loader(shards, split, batch=batch, length=length, seed=seed, order=order, epochs=epochs)
    last = {end - 1 for _, end in ours}
    document = {token: start for start, end in ours for token in range(start, end)}
    seen, scored = [], []
    for inputs, targets in pieces(loader):
        assert 1 <= len(inputs) <= length
        assert inputs == list(range(inputs[0], inputs[0] + len(inputs)))
        assert len({document[token] for token in inputs}) == 1
        assert targets == [-100 if token in last else token + 1 for token in inputs]
        seen += inputs
        scored += [target for target in targets if target != -100]
    once = sorted(document)
    size = len(once)
    assert [sorted(seen[:size]), sorted(seen[size:])] == [once, once]
    assert sorted(scored) == sorted(epochs * [token for start, end in ours for token in range(start + 1, end)])
    assert loader.tokens == size
    if order == "sequential":
        assert seen == 2 * once


@settings(deadline=None)
@given(corpus=corpora, order=orders, before=st.integers(0, 30), epochs=st.sampled_from([None, 3]), **shapes)
def test_resumed_is_uninterrupted(counting_shards, corpus, order, before, epochs, batch, length):
    shards = counting_shards(*map(list, zip(*corpus, strict=True)))

    def loader():
        return Loader(shards, batch=batch, length=length, seed=5, order=order, epochs=epochs)

    whole = loader()
    list(itertools.islice(whole, before))
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = loader()
    next(resumed)
    resumed.load_state_dict(state)
    rest, again = list(itertools.islice(whole, 20)), list(itertools.islice(resumed, 20))
    assert len(rest) == len(again)
    assert all(map(equal, rest, again))
    assert whole.state_dict() == resumed.state_dict()


@settings(deadline=None)
@given(corpus=corpora, **shapes)
def test_batches_are_all_of_one_size_but_the_very_last(counting_shards, corpus, batch, length):
    shards = counting_shards(*map(list, zip(*corpus, strict=True)))
    size = batch * length
    for got in itertools.islice(Loader(shards, batch=batch, length=length), 40):
        assert got.inputs.shape == got.targets.shape == (1, size)
        assert got.cu_seqlens.dtype == torch.int32
        assert got.cu_seqlens[0] == 0
        assert got.cu_seqlens[-1] == size
        assert got.bytes == 3 * (got.targets != -100).sum()
    finite = Loader(shards, batch=batch, length=length, epochs=3)
    sizes = [got.inputs.numel() for got in finite]
    assert sum(sizes) == 3 * finite.tokens
    assert set(sizes[:-1]) <= {size}
    assert list(finite) == []


@settings(deadline=None)
@given(
    corpus=corpora, ranks=st.integers(1, 3), each=st.integers(1, 2), length=st.integers(1, 17), before=st.integers(0, 9)
)
def test_ranks_share_each_batch_and_where_they_are(counting_shards, corpus, ranks, each, length, before):
    """Together they read what one process does, in equal stretches; another number of them goes on from there."""
    shards = counting_shards(*map(list, zip(*corpus, strict=True)))

    def loaders(ranks):
        return [Loader(shards, batch=6 * each, length=length, rank=rank, ranks=ranks) for rank in range(ranks)]

    (alone,), shared, later = loaders(1), loaders(ranks), loaders(ranks % 3 + 1)
    for step in range(before + 3):
        if step == before:  # the others go on
            states = [json.loads(json.dumps(loader.state_dict())) for loader in shared]
            assert states == [alone.state_dict()] * ranks
            shared = later
            for loader in shared:
                loader.load_state_dict(states[0])
        whole, parts = next(alone), [next(loader) for loader in shared]
        assert torch.equal(torch.cat([part.inputs for part in parts], 1), whole.inputs)
        assert torch.equal(torch.cat([part.targets for part in parts], 1), whole.targets)
        assert sum(part.bytes for part in parts) == whole.bytes
        share = whole.inputs.numel() // len(parts)
        for rank, part in enumerate(parts):
            assert part.inputs.shape == (1, share)
            bounds = {0, share, *(cut - rank * share for cut in whole.cu_seqlens.tolist())}
            assert part.cu_seqlens.tolist() == sorted(bound for bound in bounds if 0 <= bound <= share)


def test_offsets_are_on_the_cpu_whatever_the_default_device_is(counting_shards):
    shards = counting_shards([7, 9, 30, 1], [0, 0, 0, 1])
    with torch.device("meta"):
        batch = next(Loader(shards, batch=2, length=8))
    assert {batch.cu_seqlens.device.type, batch.places.device.type, batch.inputs.device.type} == {"cpu"}


def test_seed_and_epoch_draw_different_orders(counting_shards):
    shards = counting_shards([200] * 20 + [1], [0] * 20 + [1])

    def order(seed, epoch):
        loader = Loader(shards, batch=1, length=10, seed=seed)
        per_epoch = loader.tokens // 10
        return [got.inputs[0, 0].item() for got in itertools.islice(loader, epoch * per_epoch, (epoch + 1) * per_epoch)]

    drawn = [order(seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    assert drawn == [order(seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    assert len({tuple(places) for places in drawn}) == 4
    # A piece of 10 tokens rarely follows the one before it in the text: 1 in 400 by chance, so 1 expected of 399.
    assert all(sum(b - a == 10 for a, b in itertools.pairwise(places)) < 10 for places in drawn)


def test_an_interrupt_inside_a_batch_loses_no_token(counting_shards, monkeypatch):
    shards = counting_shards([7, 9, 30, 1], [0, 0, 0, 1])
    loader, twin = (Loader(shards, batch=2, length=8) for _ in range(2))
    next(loader), next(twin)
    piece, calls = Loader._piece, itertools.count()

    def interrupted(*args):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return piece(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "_piece", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(loader)
    assert equal(next(loader), next(twin))


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(lambda text: text.strip())


@settings(max_examples=30, deadline=None)
@given(written=st.lists(text, min_size=2, max_size=6), kind=st.sampled_from(["bytes", "bpe"]), length=st.integers(1, 9))
def test_bytes_are_those_of_the_scored_text(tmp_path_factory, list_source, bpe, written, kind, length):
    tokenizer = {"bytes": ByteTokenizer(), "bpe": bpe}[kind]
    source = list_source(tuple((str(number), text) for number, text in enumerate(written)))
    shards = prepare(source, tokenizer, tmp_path_factory.mktemp("bytes"), heldout=0.3)
    counted = sum(
        got.bytes for split in ("train", "heldout") for got in Loader(shards, split, batch=1, length=length, epochs=1)
    )
    firsts = sum(int(tokenizer.byte_lengths[tokenizer.encode(text)[0]]) for text in written)
    assert counted == sum(len(text.encode()) for text in written) - firsts
    assert shards.meta.bytes == sum(len(text.encode()) for text in written)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch=0: expected at least 1"),
        ({"length": -1}, "length=-1: expected at least 1"),
        ({"split": "heldot"}, "did you mean 'heldout'"),
        ({"order": "sequentially"}, "did you mean 'sequential'"),
        ({"epochs": 0}, "epochs=0"),
        ({"seed": -1}, "seed=-1"),
        ({"batch": 1 << 16, "length": 1 << 16}, "int32"),
        ({"batch": 10**5000}, "fewer than 2..31 tokens|batch="),
        ({"batch": float("nan")}, "batch=nan: expected a whole number of at least 1"),
        ({"batch": True}, "batch=True: expected a whole number"),
        ({"length": float("inf")}, "length=inf: expected a whole number"),
        ({"length": 4.0}, "length=4.0: expected a whole number"),
        ({"length": "4"}, "length='4': expected a whole number"),
        ({"length": None}, "length=None: expected a whole number"),
        ({"seed": 1 << 64}, "seed=18446744073709551616: expected at most 18446744073709551615"),
        ({"seed": float("-inf")}, "seed=-inf"),
        ({"epochs": float("nan")}, "epochs=nan"),
        ({"epochs": False}, "epochs=False"),
        ({"order": None}, "order None: expected shuffled or sequential"),
        ({"batch": 3, "ranks": 2}, "batch 3 over 2 ranks: expected a multiple of 2"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_wrong_arguments_say_what_is_right(counting_shards, changes, message):
    shards = counting_shards([5, 5], [0, 1])
    with pytest.raises(DataError, match=message) as caught:
        Loader(shards, **({"batch": 1, "length": 4} | changes))
    assert len(str(caught.value)) < 200


def test_numbers_of_numpy_and_the_largest_seed_are_numbers(counting_shards):
    shards = counting_shards([5, 5], [0, 1])
    loader = Loader(shards, batch=np.int32(1), length=np.uint8(4), seed=(1 << 64) - 1)
    next(loader)
    assert json.loads(json.dumps(loader.state_dict())) == loader.state_dict()


def test_state_of_another_run_is_refused(counting_shards):
    shards = counting_shards([50, 50], [0, 1])
    state = Loader(shards, batch=2, length=4).state_dict()
    Loader(shards, batch=3, length=4).load_state_dict(state)
    for other in (
        Loader(shards, batch=2, length=5),
        Loader(shards, batch=2, length=4, seed=1),
        Loader(shards, "heldout", batch=2, length=4),
        Loader(shards, batch=2, length=4, order="sequential"),
        Loader(counting_shards([50, 51], [0, 1]), batch=2, length=4),
    ):
        with pytest.raises(DataError, match="but this loader's"):
            other.load_state_dict(state)
    for broken in (state | {"position": 14}, state | {"offset": 4}, state | {"epoch": -1}):
        with pytest.raises(DataError, match="13 pieces"):
            Loader(shards, batch=2, length=4).load_state_dict(broken)
    with pytest.raises(DataError, match="without 'offset'"):
        Loader(shards, batch=2, length=4).load_state_dict({"epoch": 0, "position": 0})
