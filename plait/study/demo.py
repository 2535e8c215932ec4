"""The study that `plait demo` does: four kinds of model, a few minutes on two CPU cores."""

from statistics import median
from time import perf_counter

from plait.study.config import Study

PATTERNS = {
    "transformer": "(AF)4",
    "recurrent": "(DF)4",
    "sequential": "(DF)3 AF",
    "parallel": "([D|A]F)4",
}
VOCAB = 1_024


def demo_study(text: str = "stdlib", folder: str = "runs/demo") -> Study:
    """The demo over `text`, a source as in a run's data.source.

    Two runs at a time, one thread each: models this small train no faster on two threads, and far slower where the
    machine has other work too, since threads that wait for each other then stand still. All four get the same optimizer
    and learning rate: of 0.005, 0.01 and 0.03, 0.01 gave the lowest bits per byte over the four together. Alone, the
    transformer does a little better with less, the recurrent net no better.
    """
    return Study(
        patterns=PATTERNS,
        folder=folder,
        dim=128,
        parameters=1_000_000,
        tokens=450_000,
        jobs=2,
        threads=1,
        data={"source": text, "tokenizer": {"bpe": VOCAB}, "length": 128, "heldout": 0.05, "cache": f"{folder}/cache"},
        training={
            "batch": 4,
            "optimizer": "muon",
            "lr": 0.01,
            "weight_decay": 0.01,
            "device": "cpu",
            "eval_every": 0,
            "eval_tokens": 1 << 40,  # all that is held out
            "sample_every": 0,
            "save_every": 0,
        },
        sample_prompt="def read(self, " if text == "stdlib" else "The ",
        sample_temperature=0.6,
    )


def pace(steps: int = 2) -> float:
    """Training tokens a second of the demo's sequential hybrid, on one thread, measured now: `steps` steps after a first."""
    import torch

    from plait.data import Batch
    from plait.model import NextToken, build
    from plait.study.run import threads
    from plait.train.optim import Optimizers
    from plait.train.step import backward

    study = demo_study()
    run = study.run("sequential", VOCAB)
    model, size = build(run.design), run.batch * run.data.length
    optimizers, times = Optimizers(model, run), []
    ids = torch.randint(VOCAB, (1, size + 1), generator=torch.Generator().manual_seed(0))
    cuts = torch.arange(0, size + 1, run.data.length, dtype=torch.int32)
    batch = Batch(ids[:, :-1], ids[:, 1:], cuts, size)
    with threads(study.threads):
        for _ in range(1 + steps):
            started = perf_counter()
            backward(NextToken(model), batch, 1, run.precision)
            optimizers.step(1)
            times.append(perf_counter() - started)
    return size / median(times[1:])


def expected_minutes(tokens_per_s: float, cores: int) -> float:
    """Minutes of training that the demo has at this pace: all four models differ by a third from the one measured."""
    study = demo_study()
    return len(PATTERNS) * study.tokens / tokens_per_s / min(study.jobs, cores) / 60
