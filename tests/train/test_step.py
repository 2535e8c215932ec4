"""One step's gradients do not depend on how it is cut."""

import pytest
import torch

from plait.data import ByteTokenizer, Loader, prepare
from plait.model import CrossEntropy, NextToken, Objective, build
from plait.train.heldout import heldout_loss
from plait.train.step import backward, split


@pytest.fixture(scope="module")
def shards(corpus):
    return prepare(corpus, ByteTokenizer(), corpus.parent / "cache", heldout=0.2)


@pytest.fixture
def batch(shards):
    return next(Loader(shards, batch=8, length=48, seed=3))


@pytest.mark.parametrize("parts", [1, 2, 3, 8, 100])
def test_parts_are_the_whole_cut_at_pieces(batch, parts):
    cut = split(batch, parts)
    assert 1 <= len(cut) <= parts
    assert torch.equal(torch.cat([part.inputs for part in cut], 1), batch.inputs)
    assert torch.equal(torch.cat([part.targets for part in cut], 1), batch.targets)
    pieces = [length for part in cut for length in part.cu_seqlens.diff().tolist()]
    assert pieces == batch.cu_seqlens.diff().tolist()
    for part in cut:
        assert part.cu_seqlens[0] == 0
        assert part.cu_seqlens[-1] == part.inputs.shape[1]


@pytest.mark.parametrize("pattern", ["AF", "[M|D]F", "(DF)2AF"])
@pytest.mark.parametrize("parts", [2, 8])
def test_accumulation_is_the_full_batch(batch, pattern, parts):
    # float64, so that a part weighed by its own token count, off by a percent here, cannot hide in rounding
    model = build({"vocab": 257, "dim": 64, "pattern": pattern}, dtype=torch.float64)
    objective = NextToken(model)
    whole = backward(objective, batch, 1, "float32")
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    torch.testing.assert_close(backward(objective, batch, parts, "float32"), whole)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-9)


class Spaces(Objective):
    """What comes after a space is scored, and nothing else."""

    def rule(self, batch):
        return CrossEntropy(batch.targets.masked_fill(batch.inputs != ord(" "), -100))

    def count(self, batch):
        return ((batch.inputs == ord(" ")) & (batch.targets >= 0)).sum()


class Miscounted(Spaces):
    count = Objective.count


def test_an_objective_that_counts_wrong_is_refused(batch):
    model = build({"vocab": 257, "dim": 64, "pattern": "AF"})
    with pytest.raises(
        ValueError, match=r"Miscounted scored \d+ positions of a batch, but its count\(batch\) says \d+"
    ):
        backward(Miscounted(model), batch, 1, "float32")


@pytest.mark.parametrize("parts", [1, 3])
def test_the_mean_is_over_what_an_objective_scores(batch, parts):
    model = build({"vocab": 257, "dim": 64, "pattern": "AF"}, dtype=torch.float64)
    loss, _ = backward(Spaces(model), batch, parts, "float32")
    got = [parameter.grad for parameter in model.parameters()]
    scored = (batch.inputs == ord(" ")) & (batch.targets >= 0)
    logits, _ = model(batch.inputs, cu_seqlens=batch.cu_seqlens)
    want = torch.nn.functional.cross_entropy(logits[scored], batch.targets[scored])
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    for gradient, expected in zip(got, torch.autograd.grad(want, model.parameters()), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


def test_heldout_loss_is_that_of_each_document_alone(shards):
    model = build({"vocab": 257, "dim": 64, "pattern": "DFAF"})
    found = heldout_loss(NextToken(model), shards, batch=2, length=4096, tokens=1_000_000)
    starts, ends = shards.documents("heldout")
    tokens, total, scored = shards.tokens(), 0.0, 0
    for start, end in zip(starts, ends, strict=True):
        document = torch.from_numpy(tokens[start:end].astype("int64"))[None]
        with torch.no_grad():
            logits, _ = model(document[:, :-1])
        total += torch.nn.functional.cross_entropy(logits[0], document[0, 1:], reduction="sum").item()
        scored += end - start - 1
    assert found.tokens == scored
    assert found.bytes == scored - len(starts)  # all targets but the ends of text are one byte
    assert found.loss == pytest.approx(total / scored, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(total / torch.log(torch.tensor(2.0)).item() / found.bytes, rel=1e-5)


def test_heldout_loss_stops_at_its_tokens(shards):
    model = build({"vocab": 257, "dim": 64, "pattern": "AF"})
    assert heldout_loss(NextToken(model), shards, batch=2, length=32, tokens=100).tokens <= 128
