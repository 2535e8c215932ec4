"""`plait bench`: the numbers are there and agree with each other; how large they are is the machine's business."""

import pytest

from plait.design import load_design
from plait.design.count import flops_per_token, parameters, state_bytes, weights_read
from plait.evaluate import decoding, limits, training

TINY = ("DF AF", "dim=64", "vocab=300", "--device", "cpu")
DESIGN = load_design("DF AF", dim=64, vocab=300)
ROUNDING = 1e-9  # relative, of a few float64 operations


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    """Limits of small things, which take no time."""
    monkeypatch.setattr(limits, "SIDE", 64)
    monkeypatch.setattr(limits, "COPIES", 2**16)


def close(value: float):
    return pytest.approx(value, rel=ROUNDING)


@pytest.mark.parametrize("more", [[], ["--packed"], ["--precision", "float32"], ["--recompute", "cheap"]])
def test_train(plait, more):
    data = plait("bench", "train", *TINY, *("--batch", "2", "--length", "40", "--steps", "2"), *more, "--json").json
    assert data["hash"] == DESIGN.hash
    assert data["recompute"] == ("cheap" if "cheap" in more else None)
    assert data["parameters"] == parameters(DESIGN)
    assert data["tokens"] == 80
    assert data["tokens_per_s"] * data["step_s"] == close(80)
    assert data["first_s"] > 0 and data["peak_memory"] > 2**20
    assert data["mfu"] * data["limits"]["products"] * data["step_s"] == close(data["flops"])
    assert data["floor_s"] == close(
        data["flops"] / data["limits"]["products"] + data["moved"] / data["limits"]["copies"]
    )
    assert sum(kernel["share"] for kernel in data["kernels"]) == close(1)
    assert [k["ms"] for k in data["kernels"]] == sorted((k["ms"] for k in data["kernels"]), reverse=True)
    assert any("mm" in kernel["name"] for kernel in data["kernels"])
    if "--packed" not in more:  # else short documents, whose tokens see less
        assert data["flops"] == 3 * 2 * sum(flops_per_token(DESIGN, context) for context in range(1, 41))


def test_train_says_what_it_measured(plait):
    ran = plait("bench", "train", *TINY, "--batch", "1", "--length", "16", "--steps", "1", "--precision", "float32")
    assert ran.code == 0
    for word in ("tokens/s", "MFU", "the first step", "peak memory", "the sum of", "top kernels", "64 x 64 matrices"):
        assert word in ran.out
    assert 'next: plait bench decode "DF AF" dim=64 vocab=300' in ran.err


def test_decode(plait):
    asked = ("--context", "5", "--context", "30", "--batch", "1", "--batch", "3", "--precision", "float32")
    ran = plait("bench", "decode", *TINY, *asked, "--steps", "3", "--json")
    data, rows = ran.json, ran.json["results"]
    assert [(row["batch"], row["context"]) for row in rows] == [(1, 5), (1, 30), (3, 5), (3, 30)]
    for row in rows:
        assert row["tokens_per_s"] * row["ms"] / 1e3 == close(row["batch"])
        assert row["worst_ms"] >= row["ms"] > 0
        assert not row["captured"]
        assert row["state_bytes"] == row["batch"] * state_bytes(DESIGN, row["context"])
        assert row["weights_bytes"] == weights_read(DESIGN, row["batch"]) == 4 * parameters(DESIGN)
        read = row["state_bytes"] + row["weights_bytes"]
        assert row["bandwidth"] * row["ms"] / 1e3 == close(read)
        assert row["share"] == close(row["bandwidth"] / data["limits"]["copies"])
        assert row["floor_ms"] / row["ms"] == close(row["share"])
    for word in ("ms/token", "of copies", "state"):
        assert word in ran.err


def test_weights_read_are_those_multiplied_with():
    untied = DESIGN.replace(tie_embeddings=False)
    assert weights_read(untied, 1) == 4 * (parameters(untied) - 300 * 64)
    sparse = load_design("AE", dim=64, vocab=300, layers={"E": {"kind": "moe", "experts": 8, "top_k": 2}})
    assert weights_read(sparse, 1) < weights_read(sparse, 3) < weights_read(sparse, 4)
    assert weights_read(sparse, 4) == weights_read(sparse, 100) == 4 * parameters(sparse)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", *TINY, "--precision", "bfloat"], "did you mean 'bfloat16'?"),
        (["decode", *TINY, "--precision", "floot32"], "did you mean 'float32'?"),
        (
            ["train", "DF", "dim=16384", "vocab=9000000", "--device", "cpu"],
            "would fit; choose a smaller dim, vocab or pattern",
        ),
        (["decode", *TINY, "--context", "1000000", "--batch", "1000000"], "--batch"),
        (["train", "AF", "dim=64", "front={kind: vectors, features: 3}", "vocab=9"], "from tokens to tokens"),
        (["train"], "missing argument"),
        (["train", *TINY, "--batch", "0"], "see plait bench train --help"),
    ],
)
def test_refusals_are_one_line(plait, arguments, said):
    ran = plait("bench", *arguments, "--json")
    assert ran.code in (1, 2)
    assert said in ran.json["error"]
    assert ran.err.splitlines()[-1].startswith("error: ")


def needs(most: int, run):
    """`run(...)`, which finds no memory for more than `most` tokens."""

    def limited(*given, **more):
        text = next(x for x in given if isinstance(x, training.RandomText))
        if text.batch * text.length > most:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return run(*given, **more)

    return limited


@pytest.mark.parametrize(
    ("most", "said"), [(70, "--batch 2 does"), (20, "--batch 1 --length 16 does"), (0, "and no shorter one")]
)
def test_a_step_that_does_not_fit(plait, monkeypatch, most, said):
    monkeypatch.setattr(training, "Stepping", needs(most, training.Stepping))
    ran = plait("bench", "train", *TINY, "--batch", "5", "--length", "32", "--json")
    assert ran.code == 1
    assert "5 x 32 tokens does not fit" in ran.json["error"] and said in ran.json["error"]


def test_states_that_do_not_fit(plait, monkeypatch):
    """Room for three sequences, for two fifths of one, for none: what is said to fit does."""
    weights, steps = 4 * parameters(DESIGN), 2
    one = state_bytes(DESIGN, 1000 + steps + decoding.WARM_UP)

    def decode(context: int, batch: int):
        asked = ("--context", str(context), "--batch", str(batch), "--steps", str(steps), "--precision", "float32")
        return plait("bench", "decode", *TINY, *asked, "--json").json

    monkeypatch.setattr(decoding, "memory", lambda device: weights + 3 * one)
    assert "--batch 3 would fit" in decode(1000, 6)["error"]
    assert decode(1000, 3)["results"]
    monkeypatch.setattr(decoding, "memory", lambda device: weights + one * 2 // 5)
    assert "--batch 1 --context 256 would" in decode(1000, 6)["error"]
    assert decode(256, 1)["results"]
    monkeypatch.setattr(decoding, "memory", lambda device: weights + 1)
    assert "no context fits" in decode(1000, 6)["error"]


def test_alone_it_says_what_there_is(plait):
    ran = plait("bench")
    assert ran.code == 0 and "train" in ran.out and "decode" in ran.out
