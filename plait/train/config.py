"""What a run is, as data: read from YAML or JSON, written back beside the run. No torch here."""

from pathlib import Path
from typing import Any, Literal, Self

import msgspec

from plait.design import ModelConfig, load_design
from plait.design.imports import KEY, asked, located
from plait.design.load import design_mapping, override, read_mapping
from plait.design.lora import LoRA
from plait.design.spelling import suggest
from plait.design.struct import Struct, between, check_keys, convert, positive
from plait.design.yaml_core import write_yaml
from plait.files import user_path
from plait.run_folder import RUN

LARGEST_BPE = 2**20  # tokens that may be asked for, as `plait.data.tokenizer_hf` makes them
TOKENS_IN_STEP = 2**31  # offsets of documents in a batch are int32
PATHS, NO_PATHS = ("source", "tokenizer", "cache"), ("stdlib", "bytes")
CHOICES = {"optimizer": ("adamw", "muon"), "schedule": ("cosine", "wsd"), "precision": ("float32", "bfloat16")}


class DataConfig(Struct, frozen=True, kw_only=True, tag=False):
    """The text and how it is cut.

    source: "stdlib" (Python's own source), a text file, a folder, a glob, "x.jsonl:field", "hf:NAME", ... Of .jsonl records
        with `messages`, or `prompt` and `completion`, only the answers are learned; each is read whole, up to `length` tokens.
    tokenizer: "bytes", a tokenizer file or folder, or {"bpe": 4096}: one of that many tokens, trained on the source.
    length: tokens in a sequence; documents are packed into sequences and never see each other.
    heldout: share of the documents that is kept for evaluation, in (0, 1).
    cache: folder of token shards, shared by all runs over the same text.
    """

    source: str = "stdlib"
    tokenizer: str | dict[str, int] = "bytes"
    length: int = 512
    heldout: float = 0.02
    cache: str = "runs/cache"

    def __post_init__(self) -> None:
        positive(self, "length")
        for name in ("source", "tokenizer", "cache"):
            if not getattr(self, name):
                raise ValueError(f"data.{name} is empty: expected what it is to be, or leave the key out")
        self._set("cache", str(user_path(self.cache)))
        if not 0 < self.heldout < 1:
            raise ValueError(f"data.heldout must be between 0 and 1, got {self.heldout}")
        if isinstance(self.tokenizer, dict):
            for key in self.tokenizer:
                if key != "bpe":
                    raise ValueError(f"data.tokenizer: unknown key {key!r}; {suggest(key, ['bpe'])}")
            if not 257 <= self.tokenizer.get("bpe", 0) <= LARGEST_BPE:
                raise ValueError(
                    f"data.tokenizer: expected {{bpe: SIZE}} with a size of at least 257 and at most {LARGEST_BPE:,}, "
                    f"got {self.tokenizer}"
                )


class RunConfig(Struct, frozen=True, kw_only=True, tag=False):
    """One training run.

    design: a pattern, a preset, a design file, the folder of a model or run, or the design itself as a mapping. Its vocab
        is the tokenizer's in a pattern or preset, and in a mapping that leaves it out.
    import: a module to load first, or a list: its name, or a .py file's. It is written into the design.
    data: see DataConfig.
    folder: where the run is kept; a file x.yaml that does not say gives runs/x.
    start: a saved model, run or checkpoint whose weights the run begins with, instead of new ones; its design and tokenizer
        are those of the run where nothing else is said.
    lora: train low-rank additions to the projections of `start` alone, and keep those (see LoRA): {rank: 16}.

    steps: optimizer steps.                             batch: sequences in a step.
    accumulate: parts that a step's sequences are run in, to save memory; changes no number but by rounding, unless lora drops
        out, or experts have a balance loss, which is of a part's tokens.
    optimizer: "adamw", or "muon": Muon for the matrices inside the slots and AdamW for everything else.
    lr: peak learning rate, for both.                   betas: AdamW's.
    weight_decay: not on norms, biases, A_log, dt_bias, D, depthwise convolutions and other vectors.
    schedule: "cosine", or "wsd": warm up, stay, decay in a line.
    warmup, decay: how long those take (decay: wsd only); a share of the steps below 1, a number of steps from 1 on.
    lr_end: where the schedule ends, as a share of lr.  clip: largest global gradient norm; null: none.
    seed: of the weights and the order of the text.
    delayed: when layers begin to contribute, by letter or address, a share of the steps or a number: {A: 0.3} trains without
        attention at first (arXiv 2510.00258). Until then they add nothing and stay as they are.
    rates: what weights' learning rates are multiplied by, by letter, address, or a pattern of weights' names, of which the last
        that fits counts: {"*": 0.1, D: 1} trains D ten times as fast as the rest. 0: they stay as they are.

    precision: "float32", or "bfloat16": autocast, weights stay float32.
    activation_checkpointing: compute activations again in the backward pass, to save memory; true: all inside a slot, "cheap":
        not what products with weights, attention and kernels of recurrences give (a compiled slot is so by itself).
    compile: torch.compile, each kind of slot once (a teacher's too).  device: "auto" is CUDA where there is one, else "cpu".

    eval_every, sample_every, save_every: steps between; 0: only at the end (a sample: never).
    eval_tokens: held-out tokens after which an evaluation ends, with the piece that it is in.
    sample_prompt: what a sample continues.             keep_last: how many checkpoints stay.
    resume: "auto": go on where the folder has a checkpoint of this same run; true: there must be one, and all but design,
        data, start, lora, optimizer and seed may have changed; false: the folder must have none.
    """

    design: Any = None
    data: Any = DataConfig()
    folder: str = "runs/train"
    start: str | None = None
    lora: Any = None

    steps: int = 1000
    batch: int = 8
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    schedule: str = "cosine"
    warmup: float = 0.05
    decay: float = 0.2
    lr_end: float = 0.1
    clip: float | None = 1.0
    seed: int = 0
    delayed: dict[str, float] = {}
    rates: dict[str, float] = {}

    precision: str = "float32"
    activation_checkpointing: Literal["cheap"] | bool = False
    compile: bool = False
    device: str = "auto"

    eval_every: int = 200
    eval_tokens: int = 32_768
    sample_every: int = 200
    sample_prompt: str = "def "
    save_every: int = 200
    keep_last: int = 2
    resume: Literal["auto"] | bool = "auto"

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "data", convert(self.data, DataConfig, "data"))
        if isinstance(self.design, ModelConfig):
            msgspec.structs.force_setattr(self, "design", self.design.to_dict())
        msgspec.structs.force_setattr(self, "folder", str(user_path(self.folder)))
        if self.start is not None:
            self._set("start", str(user_path(self.start)))
        if self.lora is not None:
            self._set("lora", convert(self.lora, LoRA, "lora"))
            if self.start is None:
                raise ValueError("lora adds to a model that exists: give its folder, start=FOLDER")
        if self.design is not None and not isinstance(self.design, str | dict):
            raise ValueError(f"design: expected a pattern, a preset, a file or a mapping, got {self.design!r}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"RunConfig.{name}: unknown {getattr(self, name)!r}; {suggest(getattr(self, name), known)}"
                )
        positive(self, "steps", "batch", "accumulate", "lr", "clip", "eval_tokens", "keep_last")
        between(self, 1, 2**31 - 1, "steps")
        between(self, 1e-12, 1_000, "lr")  # beyond, float32 weights would not move, or not hold for long
        between(self, 0, 1_000, "weight_decay")
        between(self, 1e-12, 1e12, "clip")
        between(self, 0, 2**63 - 1, "seed")
        between(self, 0, 1, "lr_end")
        amounts = {"warmup": self.warmup, "decay": self.decay}
        for name, amount in (amounts | {f"delayed.{name}": amount for name, amount in self.delayed.items()}).items():
            if not 0 <= amount < TOKENS_IN_STEP or (amount >= 1 and amount != int(amount)):
                raise ValueError(
                    f"RunConfig.{name} must be a share of the steps below 1 or a whole number of steps, got {amount}"
                )
        for name, rate in self.rates.items():
            if not 0 <= rate <= 1_000:
                raise ValueError(f"RunConfig.rates.{name} must be between 0 and 1,000, got {rate}")
        for name in ("eval_every", "sample_every", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"RunConfig.{name} must not be below 0, got {getattr(self, name)}; 0: only at the end")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"RunConfig.betas must be in [0, 1), got {list(self.betas)}")
        if self.batch % self.accumulate:
            raise ValueError(f"RunConfig.accumulate: {self.accumulate} does not divide batch {self.batch}")
        if self.batch * self.data.length >= TOKENS_IN_STEP:
            raise ValueError(
                f"RunConfig.batch {self.batch:,} of data.length {self.data.length:,} are {self.batch * self.data.length:,} "
                f"tokens a step; expected fewer than {TOKENS_IN_STEP:,}"
            )
        if not self.folder:
            raise ValueError("RunConfig.folder is empty: expected where the run is kept, such as runs/first")
        if self.sample_every and not self.sample_prompt:
            raise ValueError(
                "RunConfig.sample_prompt is empty: expected text to go on from, or sample_every=0 for none"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in self.sample_prompt):
            raise ValueError("RunConfig.sample_prompt holds half of a surrogate pair, which is no text")
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"RunConfig: warmup ({self.warmup_steps} steps) and decay ({self.decay_steps}) "
                f"do not fit into steps {self.steps}"
            )

    @property
    def warmup_steps(self) -> int:
        return self.steps_of(self.warmup)

    @property
    def decay_steps(self) -> int:
        return self.steps_of(self.decay) if self.schedule == "wsd" else 0

    def steps_of(self, amount: float) -> int:
        """A share of the steps, or a number of them."""
        return round(amount * self.steps) if amount < 1 else int(amount)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with every key spelled out, so that the run means the same when defaults change."""
        inner = {name: value for name in ("data", "lora") if (value := getattr(self, name)) is not None}
        data = msgspec.structs.asdict(self) | {name: msgspec.structs.asdict(value) for name, value in inner.items()}
        return msgspec.to_builtins(data | {"betas": list(self.betas)})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Plain data, as YAML and JSON give it. Raises ValueError naming the field and the nearest right spelling."""
        if inside := [key for key in data if key in DataConfig.__struct_fields__]:
            raise ValueError(f"run: unknown key {inside[0]!r}; did you mean 'data.{inside[0]}'?")
        if isinstance(data.get("data"), str):
            raise ValueError(f"data: expected a mapping such as {{source: {data['data']}}}, got text")
        check_keys(data, cls, "run", also=(KEY,))
        if data.get("design") is None and data.get("start") is None:
            raise ValueError("run: 'design' is missing; expected a pattern such as \"(DF)3 AF\", a preset or a mapping")
        if KEY in data:
            data = located(data, Path.cwd())
            design = data.get("design") or data["start"]
            design = design_mapping(design) if isinstance(design, str) else design
            modules = dict.fromkeys((*asked(data), *asked(design)))
            data = {name: value for name, value in data.items() if name != KEY} | {"design": design | {KEY: [*modules]}}
        return convert(data, cls, "run")


# What must be equal for a checkpoint to be continued at all: it shapes the tensors, or what has been read already.
FIXED = ("design", "data", "lora", "optimizer", "seed")
# What may differ between a run and itself continued: where and how it computes, and what it reports.
FREE = (
    *("folder", "resume", "device", "compile", "activation_checkpointing"),
    *("eval_every", "eval_tokens", "sample_every", "sample_prompt", "save_every", "keep_last"),
)


def load_run(spec: str | Path, **overrides: Any) -> RunConfig:
    """A run from a YAML or JSON file or a run's folder; `overrides` set keys, dotted ones too, as in `data.length`.

    Raises ValueError for what cannot be meant and FileNotFoundError, in one line each.
    """
    path, own = user_path(spec), {}
    if path.is_dir():
        path, own = path / RUN, {"folder": str(path)}  # where it is now, which may not be where it was made
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a run in YAML or JSON")
    try:
        data = read_mapping(path)
    except ValueError as error:
        if path.suffix in ("", ".yaml", ".yml", ".json"):
            raise
        raise ValueError(f"{error}; expected a run; text to train on is data.source={path}") from None
    try:
        if own:
            data = at_home(data, path.parent)
        data = override({"folder": f"runs/{path.stem}"} | data | own, overrides)
        return RunConfig.from_dict(data)
    except ValueError as error:
        raise ValueError(f"{error}" if str(error).startswith(str(path)) else f"{path}: {error}") from None


def at_home(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A stored run's data with paths that lead, from here, to where they led when it was made.

    A run that was kept in runs/x and is now /a/b/runs/x was made in /a/b, and there its relative paths begin, also after the
    whole of it was copied to another machine. (Where the run's folder was given absolute, so were its paths written.)
    """
    kept, now, inputs = Path(data.get("folder", "")), folder.resolve(), data.get("data")
    if (
        kept.is_absolute()
        or not kept.parts
        or now.parts[-len(kept.parts) :] != kept.parts
        or not isinstance(inputs, dict)
    ):
        return data
    home = now.parents[len(kept.parts) - 1]
    if home == Path.cwd():
        return data
    return data | {"data": from_folder(inputs, home)}


def from_folder(inputs: dict[str, Any], home: Path) -> dict[str, Any]:
    """A run's `data` with its relative paths begun in `home`, where they lead to something there."""
    moved = {key: str(home / value) for key, value in inputs.items() if key in PATHS and relative(value)}
    if "tokenizer" in moved and not Path(moved["tokenizer"]).exists():  # "bytes", or a name on the hub
        del moved["tokenizer"]
    return inputs | moved


def relative(value: Any) -> bool:
    """Whether this value of `data` is a path that begins where the process stands."""
    return (
        isinstance(value, str)
        and value not in NO_PATHS
        and not value.startswith(("hf:", "~", "/"))
        and not Path(value).is_absolute()
    )


def resolve_design(spec: str | dict[str, Any], vocab: int | None) -> ModelConfig:
    """The design a run means for a tokenizer of `vocab` tokens (None: there is none). Raises ValueError where the design
    has fewer."""
    known = {} if vocab is None else {"vocab": vocab}
    design = load_design(known | (spec if isinstance(spec, dict) else design_mapping(spec)))
    if vocab is not None and design.vocab < vocab:
        raise ValueError(
            f"design.vocab {design.vocab} is smaller than the tokenizer's {vocab}; leave it out or give at least that"
        )
    return design


def to_yaml(run: RunConfig) -> str:
    return write_yaml(run.to_dict())
