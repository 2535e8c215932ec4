"""The study that `plait demo` does: four kinds of model, a few minutes on two CPU cores."""

from plait.study.config import Study

PATTERNS = {
    "transformer": "(AF)4",
    "recurrent": "(DF)4",
    "sequential": "(DF)3 AF",
    "parallel": "([D|A]F)4",
}
VOCAB = 1_024


def demo_study(text: str = "stdlib", folder: str = "runs/demo") -> Study:
    """The demo over `text`, a source as in a run's data.source."""
    return Study(
        patterns=PATTERNS,
        folder=folder,
        dim=128,
        parameters=1_131_072,
        tokens=400_000,
        data={"source": text, "tokenizer": {"bpe": VOCAB}, "length": 256, "cache": f"{folder}/cache"},
        training={
            "batch": 8,
            "optimizer": "muon",
            "lr": 0.01,
            "device": "cpu",
            "eval_every": 40,
            "eval_tokens": 16_384,
            "sample_every": 0,
            "save_every": 0,
        },
        sample_prompt="def ",
    )
