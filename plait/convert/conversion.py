"""What a conversion is, as data: the teacher, what becomes of it, and how the student learns. No torch here."""

from math import ceil
from pathlib import Path
from typing import Any, Literal

from plait.design.struct import Struct, between, convert, positive
from plait.files import user_path
from plait.train.config import DataConfig, RunConfig

STEPS = 2_000  # of a stage where the budget allows them: many steps help, larger batches do not (arXiv 2505.03005)
FEWEST = 4  # sequences in a step where the budget does not
ALIGN_LENGTH = 512  # tokens at most: one layer at a time has little to learn from a longer past
OURS = (
    "design",
    "data",
    "folder",
    "start",
    "steps",
    "lora",
    "rates",
    "delayed",
    "resume",
    "seed",
    "device",
)  # of a run: what the stage says itself
STAGES = ("align", "distil", "finish")

# Peak learning rates of the new layers where the model is 128 wide (benchmarks/convert_cpu.py); they go by 1 / width (arXiv
# 2203.03466), which meets what is published for widths of 1,536 to 4,096: 1e-3 to align and 1e-4 to distil.
WIDTH = 128
GATES, TURN = "*.merge.shift", 0.25  # a gate can go from attention to nothing in this share of a stage's steps
RATES = {"align": 1e-2, "distil": 1e-2, "finish": 3e-3}
WARM_UPS = {
    "align": 0.3,
    "distil": 0.05,
    "finish": 0.05,
}  # a shorter one leaves the calibrated start at once (docs/log.md)
TRAINING: dict[str, Any] = {
    "weight_decay": 0.0,
    "eval_every": 0,
    "sample_every": 0,
    "save_every": 250,
}


class Conversion(Struct, frozen=True, kw_only=True, tag=False):
    """One conversion.

    teacher: a model's or run's folder, a folder of transformers, a GGUF file, "smollm2".
    out: the folder it is kept in; the converted model is that folder.

    to: the student's pattern, with the teacher's slots, or a part of it that is repeated: "((DF)3 AF)". With `select` it says
        what goes in and how much attention stays, and the rule says where.
    mixer: letters or kinds of what takes attention's place, in turn: [D, M].
    keep: how much attention stays: a share "25%", a number of layers, or their addresses [A#3, A#7].
    select: the rule that chooses which; see `plait.convert.RULES`.

    select_tokens: of text that the rule measures on; null: a twentieth of the budget, 524,288 at most.
    data: as in a run; its tokenizer is the teacher's.
    calibrate: tokens of text that new layers' gates, decays and outputs are set by before training; 0: none.
    budget: tokens of text that the training stages read in all.
    align_share, finish_share: of the budget; the rest is for distilling.
    body: the learning rate of what was the teacher's, as a share of the new layers'. In alignment it is 0.
    price: of parallel slots: nats a token that attention has to be worth in one, to keep its weight while distilling.
    prune: which of them lose their attention after distilling, those first that weigh it least: so many that this much
        attention is left in the model, a share "25%" or a number of layers; or "left": all whose gates have left it.
    cross_entropy: weight of the text's own loss beside the teacher's.
    temperature: of both distributions while distilling.
    top: likeliest next ids of the teacher that are written down once at every token that is read, before distilling, and
        learned from instead of running it at every step; all others count as one. 0: it runs at every step.
    head: "tied": as the teacher's; "own": an untied one, which begins as the embeddings; "retied": an untied one while
        distilling, which is dropped at the end. Of a teacher whose head is not tied, all are the same.
    training: keys of a run for all stages; align, distil, finish: and for one of them; `length` there is its data.length.
    seed: of new weights and of the order of the text.    device: "auto" is CUDA where there is one.
    """

    teacher: str
    out: str
    to: str | None = None
    mixer: tuple[str, ...] = ()
    keep: str | int | tuple[str, ...] | None = None
    select: str | None = None
    select_tokens: int | None = None

    data: Any = DataConfig()
    calibrate: int = 8_192
    budget: int = 1_000_000
    align_share: float = 0.2
    finish_share: float = 0.0
    body: float = 0.3
    price: float = 0.1
    prune: str | int | None = None
    cross_entropy: float = 0.0
    temperature: float = 1.0
    top: int = 0
    head: Literal["tied", "own", "retied"] = "tied"
    training: dict[str, Any] = {}
    align: dict[str, Any] = {}
    distil: dict[str, Any] = {}
    finish: dict[str, Any] = {}
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        self._set("data", convert(self.data, DataConfig, "data"))
        if self.data.tokenizer != DataConfig().tokenizer:
            raise ValueError("Conversion.data.tokenizer: the student has the teacher's tokenizer; leave it out")
        self._set("out", str(user_path(self.out)))
        self._set("teacher", str(user_path(self.teacher)))
        positive(self, "budget", "temperature", "select_tokens")
        between(self, 0, 1, "align_share", "finish_share", "body")
        between(self, 0, 1_000, "cross_entropy", "price")
        between(self, 0, 2**24, "calibrate")
        between(self, 0, 2**12, "top")
        if self.top and self.temperature != 1:
            raise ValueError(f"Conversion.top: what is written down has the temperature 1, not {self.temperature}")
        if self.align_share + self.finish_share > 1:
            raise ValueError(
                f"Conversion: align_share {self.align_share} and finish_share {self.finish_share} are more than the budget"
            )
        for name in ("training", *STAGES):
            for key in getattr(self, name):
                if key in OURS:
                    raise ValueError(f"Conversion.{name}.{key} is what the conversion sets itself; leave it out")
            if name in STAGES and getattr(self, name) and not self.tokens(name):
                raise ValueError(
                    f"Conversion.{name}: {name} has no share of the budget, so its keys change nothing; leave them out, or "
                    "give it one by align_share and finish_share"
                )
        if self.prune is not None and not self.tokens("distil"):
            raise ValueError(
                "Conversion.prune: gates move away from attention while distilling, which has no share of the budget; leave it "
                "out"
            )
        if self.head != "tied" and not self.tokens("distil") + self.tokens("finish"):
            raise ValueError(
                f"Conversion.head: {self.head!r} is learned while distilling, which has no share of the budget; leave it out"
            )
        self.runs()  # raises for what no run can be

    def share(self, stage: str) -> float:
        """Of the budget."""
        shares = {"align": self.align_share, "finish": self.finish_share}
        return shares.get(stage, 1 - self.align_share - self.finish_share)

    def tokens(self, stage: str) -> int:
        """That a stage may read."""
        return round(self.budget * self.share(stage))

    def has(self, stage: str) -> bool:
        """Whether anything is asked for of a stage."""
        return self.prune is not None if stage == "prune" else stage not in STAGES or self.tokens(stage) > 0

    def runs(self, new: tuple[str, ...] = (), dim: int = WIDTH, gated: bool = False) -> dict[str, RunConfig]:
        """The training run of each stage that has a share of the budget; `new`: addresses of the new layers in the student,
        which is `dim` wide; gated: whether it has gates."""
        stages = [stage for stage in STAGES if self.tokens(stage)]
        return {stage: self._run(stage, new, dim, gated) for stage in stages}

    def _run(self, stage: str, new: tuple[str, ...], dim: int, gated: bool) -> RunConfig:
        usual = {"lr": RATES[stage] * WIDTH / dim, "warmup": WARM_UPS[stage]}
        keys = usual | TRAINING | self.training | getattr(self, stage)
        length = keys.pop("length", min(ALIGN_LENGTH, self.data.length) if stage == "align" else self.data.length)
        tokens = self.tokens(stage)
        batch = keys.pop("batch", None) or max(FEWEST, tokens // (STEPS * length))
        if tokens < batch * length:
            raise ValueError(
                f"budget: {self.budget:,} tokens leave {tokens:,} to {stage}, less than one step of {batch * length:,} "
                f"({batch} sequences of {length}); give at least "
                f"{ceil(batch * length / self.share(stage)):,}"
            )
        body, steps = 0.0 if stage == "align" else self.body, tokens // (batch * length)
        gates = {GATES: max(1.0, 1 / (TURN * steps * keys["lr"]))} if gated and stage != "align" else {}
        return RunConfig(
            design="AF",  # until the stage before has left a model to start from
            data=self.data.replace(length=length),
            folder=str(Path(self.out, stage)),
            steps=steps,
            batch=batch,
            rates={"*": body} | dict.fromkeys(new, 1.0) | gates if new else {},
            seed=self.seed,
            device=self.device,
            **keys,
        )
