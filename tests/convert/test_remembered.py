"""What is written down of a teacher, beside what it says when it is asked; and KL from that, beside its formula."""

import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file

import plait
from plait.convert import Stages
from plait.convert.remembered import Remembered
from plait.data import ByteTokenizer, Loader, prepare
from plait.model.loss import KL, loss_of
from plait.model.top_kl import TopKL
from plait.run_folder import METRICS
from plait.train.metrics import read_metrics

HALF = 2**-10  # relative error of float16


@pytest.fixture
def shards(text):
    return prepare(str(text), ByteTokenizer(), text.parent / "cache", heldout=0.2)


@pytest.fixture
def teacher(teacher_folder):
    return plait.load(teacher_folder)


def logits(n, v, seed):
    return 3 * torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 5])
def test_kl_of_the_likeliest_ids(k):
    y, theirs, scored = logits(7, 11, 0).requires_grad_(True), logits(7, 11, 1), torch.arange(7) % 3 > 0
    logp, ids = theirs.log_softmax(-1).topk(k)
    loss = loss_of(y, TopKL(ids, logp, 1 - logp.exp().sum(-1), scored))

    p, q = theirs.softmax(-1), y.softmax(-1)
    among = torch.zeros(7, 11, dtype=torch.bool).scatter_(1, ids, True)
    rest = [(x * ~among).sum(-1) for x in (p, q)]
    rows = (among * p * (p.log() - q.log())).sum(-1) + rest[0] * (rest[0] / rest[1]).log()
    want = (rows * scored).sum()
    torch.testing.assert_close(loss.total, want)
    assert loss.count == scored.sum()
    own = [torch.autograd.grad(total, y, retain_graph=True)[0] for total in (loss.total, want)]
    torch.testing.assert_close(*own)


def test_of_all_ids_it_is_kl():
    y, theirs = logits(7, 11, 0).requires_grad_(True), logits(7, 11, 1)
    logp, ids = theirs.log_softmax(-1).topk(11)
    every = torch.ones(7, dtype=torch.bool)
    totals = [
        loss_of(y, rule).total
        for rule in (
            TopKL(ids, logp, torch.zeros(7, dtype=torch.float64), every),
            KL(theirs, lambda x: x, scored=every),
        )
    ]
    torch.testing.assert_close(*totals)
    torch.testing.assert_close(*(torch.autograd.grad(total, y)[0] for total in totals))


def filled(folder, loader, steps, teacher, top=5):
    said = Remembered(folder, loader, steps, top, "hash")
    for number in said.missing():
        said.write(number, teacher, "float32")
    assert not said.missing()
    return said


def rows(said):
    """Tokens on disk."""
    return sum(len(load_file(path)["left"]) for path in said.folder.glob("*.safetensors"))


def test_it_is_what_the_teacher_says(shards, teacher, tmp_path):
    """In every epoch's order, of all tokens but the rests of pieces that a batch's end has cut."""
    loader, cut, seen = Loader(shards, batch=3, length=32), 0, 0
    said = filled(tmp_path / "said", loader, 1_000, teacher)
    assert rows(said) == said.tokens == loader.tokens
    assert sum(file.stat().st_size for file in said.folder.iterdir()) > said.bytes
    while loader.epoch < 2:
        batch = next(loader)
        ids, logp, left = said.read(batch)
        known = said.known(batch)
        with torch.no_grad():
            theirs = teacher(batch.inputs, cu_seqlens=batch.cu_seqlens)[0][0].log_softmax(-1)
        mine = theirs.gather(1, ids.long())[known]
        torch.testing.assert_close(logp.float()[known], mine, rtol=HALF, atol=1e-4)
        torch.testing.assert_close(mine, theirs.topk(5)[0][known], rtol=HALF, atol=1e-4)
        torch.testing.assert_close(left[known], 1 - mine.exp().sum(-1), rtol=1e-5, atol=1e-6)
        cut, seen = cut + int((~known).sum()), seen + len(known)
    assert 0 < cut < seen / 4


def test_no_more_is_written_than_is_read(shards, teacher, tmp_path, monkeypatch):
    """Nor is what is there written again where more is read later, but for a file that was not full."""
    monkeypatch.setattr("plait.convert.remembered.PIECES", 8)

    def loader():
        return Loader(shards, batch=3, length=32, seed=7)

    few = filled(tmp_path / "said", loader(), 4, teacher)
    assert 4 * 3 * 32 <= rows(few) < 4 * 3 * 32 + 32
    whole = {path.name: path.stat().st_mtime_ns for path in sorted(few.folder.glob("*.safetensors"))[:-1]}
    batches = loader()
    for _ in range(4):
        few.read(next(batches))
    more = filled(tmp_path / "said", loader(), 9, teacher)
    assert 9 * 3 * 32 <= rows(more) < 9 * 3 * 32 + 32
    assert whole and all((more.folder / name).stat().st_mtime_ns == time for name, time in whole.items())
    alone, batches = filled(tmp_path / "alone", loader(), 9, teacher), loader()
    for batch in [next(batches) for _ in range(9)]:
        for ours, theirs in zip(more.read(batch), alone.read(batch), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert few.missing() == []  # and what is there serves a run that reads less
    with pytest.raises(ValueError, match="said is of seed 7, not 0: remove it"):
        Remembered(tmp_path / "said", Loader(shards, batch=3, length=32), 4, 5, "hash").check()


def test_files_are_made_anew_where_they_are_gone(shards, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("plait.convert.remembered.PIECES", 16)
    loader = Loader(shards, batch=3, length=32)
    said = Remembered(tmp_path / "said", loader, 1_000, 5, "hash")
    assert len(said.missing()) > 2
    filled(said.folder, loader, 1_000, teacher)
    path = said.folder / "000001.safetensors"
    before = path.read_bytes()
    path.unlink()
    assert said.missing() == [1]
    said.write(1, teacher, "float32")
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="said is of top 5, not 6: remove it"):
        Remembered(tmp_path / "said", loader, 1_000, 6, "hash").check()


def test_a_student_learns_from_the_disk(make_asked, quiet, tmp_path):
    """Of all ids the first step's loss is that of the teacher itself: no piece of its batch lacks its beginning."""
    found = {}
    for name, top in (("teacher", 0), ("disk", 257)):
        Stages(make_asked(out=str(tmp_path / name), top=top), quiet).upto("model")
        found[name] = read_metrics(tmp_path / name / "distil" / METRICS)
    teacher, disk = ([record["loss"] for record in found[name] if "loss" in record] for name in ("teacher", "disk"))
    assert disk[0] == pytest.approx(teacher[0], rel=2e-4) and disk[-1] < disk[0]
    heldout = [next(r["heldout_loss"] for r in found[name] if "heldout_loss" in r) for name in ("teacher", "disk")]
    assert heldout[1] == pytest.approx(heldout[0], rel=0.05)  # both of the teacher's own, after nearly equal steps
    written = load_file(tmp_path / "disk/said/32/000000.safetensors")
    assert 9 * 4 * 32 <= len(written["left"]) < 9 * 4 * 32 + 32 and not (tmp_path / "teacher/said").exists()


def test_a_disk_without_room(make_asked, quiet, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 50_000))
    with pytest.raises(ValueError, match=r"top: 16 ids of [\d,]+ tokens are .* has 48.83 KiB free; top=9 would fit"):
        Stages(make_asked(top=16), quiet).upto("model")
    assert not (tmp_path / "out/plan.yaml").exists()
    with pytest.raises(ValueError, match="has the temperature 1, not 2.0"):
        make_asked(top=16, temperature=2.0)
