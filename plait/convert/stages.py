"""A conversion from beginning to end, each stage in a folder of its own and done once:

    convert.yaml    what was asked for
    plan.yaml       which layers stay, and what the others become; a person may edit it before the stages after it begin
    transfer/       the student before any training, and the plan that it was made by
    said/           where the teacher's distributions are kept (`Conversion.top`)
    align/, distil/, finish/    runs, as `plait train` leaves them
    prune/          the distilled student without the attention that its gates have left (`Conversion.prune`)
    config.json, model.safetensors, ...    the converted model, with the teacher's tokenizer
    report.json, report.html

Run again, what is there is kept, and a run that was stopped goes on at the step where it stopped.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from plait.convert.align import Alignment, powers, slots_of
from plait.convert.conversion import Conversion
from plait.convert.distil import FromDisk, retied, untied
from plait.convert.gates import Priced, gates, pruned, to_prune
from plait.convert.parallel import is_gated, is_parallel, new_places
from plait.convert.plan import Plan, teacher_hash
from plait.convert.planning import make_plan, share
from plait.convert.remembered import Remembered
from plait.convert.room import check_room
from plait.convert.scores import Score
from plait.convert.transfer import student_of
from plait.data import Loader, Shards, Tokenizer, load_tokenizer
from plait.design.load import read_mapping
from plait.design.model import ModelConfig
from plait.design.places import pairs
from plait.design.struct import convert as from_data
from plait.design.yaml_core import write_yaml
from plait.files import write_text
from plait.model import Distillation, LanguageModel, Objective, save
from plait.model.device import find_device
from plait.model.files import ENDS
from plait.model.objective import Batch
from plait.opening import folder_design, load, model_path
from plait.run_folder import latest, step_of
from plait.train import Interrupted, RunConfig, train
from plait.train.heldout import heldout_documents, packed, pieces, up_to
from plait.train.inputs import check_heldout, open_shards
from plait.train.lock import alone_in

ASKED, PLAN, TRANSFER, UNTIED, SAID, PRUNE = "convert.yaml", "plan.yaml", "transfer", "untied", "said", "prune"
FREE = ("device", "out", "teacher")  # where it is computed, and where things lie: the plan knows the teacher's weights
CALIBRATION_LENGTH = 512  # tokens of a row
SELECT_TOKENS = 2**19  # at most, where nothing is said: a rule reads them once for each layer
SCALE_TOKENS = 16_384  # held-out tokens that a layer's output is measured on
TRAINED = ("align", "distil", "finish")
ORDER = ("plan", "transfer", "align", "distil", PRUNE, "finish", "model")


@dataclass
class Stages:
    """scores: how good a model is, for rules that choose by it; see `make_plan`."""

    asked: Conversion
    console: Console
    scores: Mapping[str, Score] = field(default_factory=dict)

    def upto(self, last: str) -> None:
        """Do what is not done yet, up to a stage of ORDER. Raises ValueError for what cannot be, and TrainingStopped as `train`
        does."""
        with alone_in(self.folder, "another conversion"):
            self.claim()
            self.check_lengths()
            self.check_room()
            for stage in ORDER[: ORDER.index(last) + 1]:
                plan = partial(self.make_plan, alone=last == ORDER[0])
                own = {"plan": plan, "transfer": self.transfer, PRUNE: self.prune, "model": self.finish_model}
                own[stage]() if stage in own else self.train(stage)

    @property
    def folder(self) -> Path:
        return Path(self.asked.out)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def claim(self) -> None:
        """Raise ValueError where the folder holds another conversion, or something else."""
        path = self.folder / ASKED
        if path.is_file():
            theirs = from_data(read_mapping(path), Conversion, str(path))
            for name in Conversion.__struct_fields__:
                before, now = getattr(theirs, name), getattr(self.asked, name)
                if name not in FREE and before != now:
                    raise ValueError(
                        f"{self.folder} holds a conversion with {name} {before!r}, not {now!r}: give another --out"
                    )
            return
        if any(self.folder.glob("*.safetensors")) or latest(self.folder) is not None:
            raise ValueError(f"{self.folder} holds a model or a run: give another --out")

    def check_lengths(self) -> None:
        """Raise ValueError where a stage reads longer pieces than the teacher's positions go."""
        asked, most = self.asked, LanguageModel.limit(folder_design(self.asked.teacher))
        for stage, run in asked.runs().items():
            if most is not None and run.data.length > most:
                said = [name for name in (stage, "training") if "length" in getattr(asked, name)]
                raise ValueError(
                    f"{stage}: reads {run.data.length:,} tokens at once, and the teacher's positions end at {most:,}; give "
                    f"{(said or ['data'])[0]}.length={most}"
                )

    def check_room(self) -> None:
        """Raise ValueError where a stage that is to be done does not fit on the GPU, or its files on the disk."""
        if self.device.type == "cuda":
            runs = self.asked.runs().items()
            left = {stage: self.suited(run, stage) for stage, run in runs if not self.is_done(stage)}
            free, _ = torch.cuda.mem_get_info(self.device)
            check_room(folder_design(self.asked.teacher), left, free, str(self.device))
        for stage, run in self.asked.runs().items():
            if self.asked.top and stage != "align" and not self.is_done(stage):
                self.said(run).check()

    def check_text(self) -> None:
        """Raise ValueError for text that cannot be trained on, before the folder is this conversion's."""
        check_heldout(next(iter(self.asked.runs().values())), self.shards)

    @cached_property
    def device(self) -> torch.device:
        return find_device(self.asked.device)

    @cached_property
    def teacher(self) -> LanguageModel:
        with self.console.status("reading the teacher"):
            return load(self.asked.teacher, self.device, torch.float32)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(model_path(self.asked.teacher))

    @cached_property
    def shards(self) -> Shards:
        """The text, tokenized as the teacher does."""
        with self.console.status("reading the text") as status:

            def progress(done: int, total: int | None) -> None:
                status.update(f"tokenizing: {done / 1e6:.1f} MB" + (f" of {total / 1e6:.1f}" if total else ""))

            return open_shards(self.asked.data, self.tokenizer, progress)

    # the plan

    @cached_property
    def plan(self) -> Plan:
        plan = Plan.read(self.folder / PLAN)
        plan.check(self.teacher)
        return plan

    def make_plan(self, alone: bool) -> None:
        """alone: no other stage is to follow, and so no text need be there."""
        path = self.folder / PLAN
        there = path.is_file()
        with self.console.status("choosing the layers that stay"):
            plan = self.plan if there else make_plan(self.asked, self.teacher, self.measured_on, self.scores)
        kept_attention(self.asked.prune, plan)  # raises for what cannot be
        if not alone and not (self.folder / TRANSFER).is_dir():
            self.check_text()
        if not there:
            plan.write(path)
        self.keep_asked()
        if there:
            return
        cost = f"; it took {plan.cost.tokens:,} tokens and {plan.cost.seconds:.1f} s" if plan.cost.tokens else ""
        self.say(f"plan by {plan.rule}: {plan.words}{cost}")

    def keep_asked(self) -> None:
        """Only once there is a plan: what cannot be leaves the folder to be asked again."""
        path = self.folder / ASKED
        if not path.is_file():
            write_text(path, write_yaml(self.asked.to_dict()))

    def measured_on(self) -> Sequence[Batch]:
        """What a rule measures on: the first batches of the text."""
        run = list(self.asked.runs().values())[-1]
        size = run.batch * run.data.length
        tokens = self.asked.select_tokens or min(self.asked.budget // 20, SELECT_TOKENS)
        count = max(1, tokens // size)
        loader = Loader(self.shards, batch=run.batch, length=run.data.length, seed=self.asked.seed)
        return [batch.to(self.device) for batch in islice(loader, count)]

    # the student before training

    def transfer(self) -> None:
        folder = self.folder / TRANSFER
        if folder.is_dir():
            if Plan.read(folder / PLAN) != self.plan:
                raise ValueError(
                    f"{self.folder / PLAN} is not the plan that {folder} was made by any more: give another --out, or remove "
                    f"{folder} and the stages after it"
                )
            return

        def fill(temporary: Path) -> None:
            with self.console.status("carrying weights over"):
                save(student_of(self.teacher, self.plan, text=self.calibration()), temporary, self.tokenizer)
            self.plan.write(temporary / PLAN)

        write_folder(folder, fill)

    def calibration(self) -> torch.Tensor | None:
        """Rows of training text, from all over it, that new layers are set by; None where none is asked for."""
        if not self.asked.calibrate:
            return None
        starts, ends = self.shards.documents("train")
        most = min(CALIBRATION_LENGTH, self.teacher.max_positions or CALIBRATION_LENGTH)
        length = int(min(most, (ends - starts).max()))
        begins = [at for start, end in zip(starts, ends, strict=True) for at in range(start, end - length + 1, length)]
        count = min(len(begins), max(1, self.asked.calibrate // length))
        ids = self.shards.tokens()
        rows = [ids[begins[i * len(begins) // count] :][:length].astype("int64") for i in range(count)]
        return torch.stack([torch.from_numpy(row) for row in rows]).to(self.device)

    def new_layers(self, student: ModelConfig) -> tuple[str, ...]:
        """Addresses of the layers that a student has in the place of the teacher's, or beside them."""
        found = [
            pair for pair in pairs(self.teacher.design.slots, student.slots) if pair[0].address in self.plan.replace
        ]
        return tuple(new.address for old, now in found for new in new_places(old, now))

    # training

    def run(self, stage: str) -> RunConfig | None:
        """The run of a stage that has a share of the budget, from what the stages before it have left."""
        if not self.asked.tokens(stage):
            return None
        start = self.begins(stage)
        student = folder_design(start)
        run = self.asked.runs(self.new_layers(student), self.teacher.design.dim, bool(gates(student)))[stage]
        return self.suited(run, stage).replace(design=None, start=str(start))

    def suited(self, run: RunConfig, stage: str) -> RunConfig:
        """In bfloat16 on a GPU where nothing else is said."""
        said = "precision" in self.asked.training | getattr(self.asked, stage)
        return run if said or self.device.type != "cuda" else run.replace(precision="bfloat16")

    def begins(self, stage: str) -> Path:
        """What holds the weights that a stage begins with: those of the stage before it that there was."""
        before = [name for name in TRAINED[: TRAINED.index(stage)] if self.asked.tokens(name)]
        start = self.folder / (before[-1] if before else TRANSFER)
        if stage == "finish" and (self.folder / PRUNE).is_dir():
            start = self.folder / PRUNE
        first = stage != "align" and "distil" not in before
        if not (first and self.asked.head != "tied" and self.teacher.design.tied):
            return start
        folder = self.folder / UNTIED
        if not folder.is_dir():
            write_folder(folder, lambda temporary: save(untied(load(start)), temporary, self.tokenizer))
        return folder

    def train(self, stage: str) -> None:
        if (self.folder / stage).is_dir() and self.is_done(stage):
            return
        run = self.run(stage)
        if run is None:
            return
        self.say(f"{stage}: {run.steps:,} steps, {run.steps * run.batch * run.data.length:,} tokens")
        try:
            result = train(run, objective=self.objective(stage, run), console=self.console)
        except Interrupted as stop:
            raise Interrupted(f"{stage} stopped and saved", stop.folder, stop.checkpoint) from None
        finally:
            self.__dict__.pop("teacher", None)  # the run may have compiled its slots, for the shapes of training alone
        self.say(f"{stage}: held-out loss {result.heldout.loss:.4f}, {result.seconds:.0f} s")

    def is_done(self, stage: str) -> bool:
        newest, run = latest(self.folder / stage), self.asked.runs().get(stage)
        return run is None or (newest is not None and step_of(newest) >= run.steps)

    def objective(self, stage: str, run: RunConfig) -> Callable[[LanguageModel], Any]:
        if stage != "align":
            how = {"teacher": self.teacher, "cross_entropy": self.asked.cross_entropy}
            more = {"said": self.written(run)} if self.asked.top else {"temperature": self.asked.temperature}
            kind = FromDisk if self.asked.top else Distillation
            return partial(self.distillation, stage, partial(kind, **how, **more))
        slots = slots_of(self.teacher.design, self.plan.replace)
        found = powers(self.teacher, slots, self.heldout(run.data.length, SCALE_TOKENS), run.precision)
        return partial(Alignment, teacher=self.teacher, powers=found)

    def distillation(self, stage: str, made: Callable[[LanguageModel], Objective], model: LanguageModel) -> Objective:
        """With a price on attention while its gates may leave it."""
        priced = stage == "distil" and self.asked.price and gates(model.design)
        return Priced(made(model), self.asked.price) if priced else made(model)

    def said(self, run: RunConfig) -> Remembered:
        """What the teacher says of the text that a run reads, as far as it has been written down."""
        top, length = min(self.asked.top, self.teacher.design.vocab), run.data.length
        loader = Loader(self.shards, batch=run.batch, length=length, seed=run.seed)
        steps = run.steps + 1  # a run that is no longer finite looks for the layer where that began in the batch after
        return Remembered(self.folder / SAID / str(length), loader, steps, top, teacher_hash(self.teacher))

    def written(self, run: RunConfig) -> Remembered:
        """All of it, file by file."""
        said = self.said(run)
        for done, number in enumerate(missing := said.missing()):
            with self.console.status(f"writing down what the teacher says: {done} of {len(missing)}"):
                said.write(number, self.teacher, run.precision)
        return said

    def heldout(self, length: int, tokens: int) -> Any:
        """Batches of held-out text."""
        parts = up_to(pieces(heldout_documents(self.shards), length), tokens)
        return packed(parts, self.shards.token_bytes(), 8 * length)

    # attention that its gates have left

    def prune(self) -> None:
        folder = self.folder / PRUNE
        if self.asked.prune is None or folder.is_dir():
            return
        model = load(self.last())
        gone = to_prune(model, kept_attention(self.asked.prune, self.plan))
        write_folder(folder, lambda temporary: save(pruned(model, gone), temporary, self.tokenizer))
        self.say(f"prune: {', '.join(gone) or 'no slot'} without attention from here on")

    # the model

    def finish_model(self) -> None:
        if (self.folder / ENDS).is_file():  # which is written last
            return
        model = load(self.last())
        if self.asked.head == "retied" and self.teacher.design.tied:
            model = retied(model)
        save(model, self.folder, self.tokenizer)

    def last(self) -> Path:
        """What holds the newest weights."""
        return self.folder / self.left()[-1]

    def left(self) -> list[str]:
        """The folders that hold weights, in order."""
        return [name for name in ORDER if self.holds(name)]

    def holds(self, name: str) -> bool:
        return latest(self.folder / name) is not None if name in TRAINED else (self.folder / name).is_dir()


def kept_attention(prune: str | int | None, plan: Plan) -> int | None:
    """How many attention layers pruning leaves; None: as many as their gates do. Raises ValueError where that cannot be."""
    if prune is None:
        return None
    parallel = {address: mixer for address, mixer in plan.replace.items() if is_parallel(mixer)}
    beside = len(parallel)
    if not beside:
        raise ValueError(
            "prune: attention goes from parallel slots, and there are none; give --to or --mixer such as '[D|A]'"
        )
    if wrong := [address for address, mixer in parallel.items() if not is_gated(mixer)]:
        raise ValueError(
            f"prune: {wrong[0]} has no gate between attention and one new mixer; expected such as '[D|A]', its merge left out"
        )
    if prune == "left":
        return None
    everywhere = len(plan.keep) + beside
    count = share(str(prune), len(plan.keep) + len(plan.replace))
    if count is None or not len(plan.keep) <= count <= everywhere:
        raise ValueError(
            f"prune: {prune!r} leaves no number of attention layers from {len(plan.keep)}, which stand alone, to {everywhere}; "
            "expected such a number, a share of all such as '25%', or 'left'"
        )
    return count


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """A folder as `fill` leaves it, or none: under a name that begins with a dot until it is whole."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        fill(temporary)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
