"""Training, from a config to a trained model in a folder."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import nn

from plait.data import Tokenizer
from plait.design import ModelConfig
from plait.files import write_text
from plait.model import LanguageModel, NextToken, Objective, build, load
from plait.model.device import find_device
from plait.ops.shooting import NotConverged
from plait.train.checkpoint import Checkpoint, Position, save_checkpoint
from plait.train.config import RunConfig, from_folder, to_yaml
from plait.train.display import Display
from plait.train.errors import Interrupted, NonFinite, SaveFailed, TrainingStopped, Unsolved
from plait.train.folder import CONFIG, METRICS, latest, remove_leftovers
from plait.train.guard import first_nonfinite, weights_finite
from plait.train.heldout import HeldOut
from plait.train.inputs import Batches, Inputs, own_inputs, text_inputs
from plait.train.instructions import fast_dtype
from plait.train.lock import alone_in
from plait.train.metrics import MetricsLog
from plait.train.optim import Optimizers
from plait.train.result import Result
from plait.train.signals import Signals
from plait.train.solver import Stats, as_data, read
from plait.train.step import backward

Sample = Callable[[LanguageModel, Tokenizer, str], str]


def train(
    run: RunConfig,
    *,
    objective: Callable[[LanguageModel], Objective] = NextToken,
    start: str | Path | None = None,
    batches: Batches | None = None,
    heldout: Callable[[], Iterable[Any]] | None = None,
    sample: Sample | None = None,
    console: Console | None = None,
) -> Result:
    """Train, or go on training, what `run` describes, in `run.folder`; see `RunConfig.resume`.

    `objective(model)` gives what steps optimise, a `plait.model.Objective`: next tokens, or one's own.
    `start` is `run.start`: a folder whose weights the run begins with.
    `batches` stand in for the text of `run.data`, and `heldout()` gives those to measure on.
    `sample(model, tokenizer, prompt)` gives the text that is shown and logged every `sample_every` steps.
    `console` is where progress goes: standard error unless given; `Console(quiet=True)` for none.
    Raises ValueError and OSError for a run that cannot begin, and TrainingStopped for one that had to stop, which is
    Interrupted, NonFinite, Unsolved or SaveFailed. In each case the checkpoints written before are whole.
    """
    run = run if start is None else run.replace(start=str(start))
    folder = Path(run.folder)
    with Display(console or Console(stderr=True), run.steps) as display, alone_in(folder):
        before = _open_folder(run)
        kept = None if before is None else folder / "tokenizer"
        inputs = text_inputs(run, kept, display.reading) if batches is None else own_inputs(run, batches, heldout)
        run = run.replace(design=inputs.design.to_dict())
        device = find_device(run.device)
        if before is None:
            torch.manual_seed(run.seed)
            model, position = first_model(run, inputs.design, device), Position()
        else:
            before.check_same_run(run, inputs.batches)
            model, position = before.load_model(device), before.position
        optimizers = Optimizers(model, run)
        if before is not None:
            before.restore(optimizers, inputs.batches)
        introduce(display, run, model, inputs, before)
        if position.step < run.steps:  # else nothing will happen here, and the run stays what it was
            if inputs.tokenizer is not None:
                inputs.tokenizer.save(folder / "tokenizer")
            write_text(folder / CONFIG, to_yaml(stored(run)))
        with Signals() as signals, MetricsLog(folder / METRICS, position.step) as log:
            return _Training(
                run, objective(model), inputs, optimizers, position, sample, display, signals, log
            ).to_the_end()


def first_model(run: RunConfig, design: ModelConfig, device: torch.device) -> LanguageModel:
    """The model that step 1 begins with: new weights, or those of `run.start`."""
    if run.start is None:
        return build(design, seed=run.seed, device=device)
    model = load(run.start, device=device, dtype=torch.float32)
    if model.design.hash != design.hash:
        raise ValueError(
            f"start: {run.start} holds {model.design.pattern!r} of hash {model.design.hash}, and the run's design is "
            f"{design.pattern!r} of {design.hash}; leave `design` out to train the one that it holds"
        )
    return model


def stored(run: RunConfig) -> RunConfig:
    """The run as its folder tells it; see `at_home` for its paths."""
    data = msgspec.structs.asdict(run.data)
    if Path(run.folder).is_absolute():
        data = from_folder(data, Path.cwd())
    return run.replace(resume="auto", data=data)


def introduce(
    display: Display, run: RunConfig, model: LanguageModel, inputs: Inputs, before: Checkpoint | None
) -> None:
    """What is about to be done: the model, the device, the text, the folder."""
    device, count = model.device, sum(parameter.numel() for parameter in model.parameters())
    display.note(f"{model.design.pattern}: {count:,} parameters, {run.precision} on {device}; folder {run.folder}")
    display.note(inputs.said)
    if run.precision == "bfloat16" and fast_dtype(device) != torch.bfloat16:
        display.note(f"precision bfloat16 is slow on this {device.type}, which has no instructions for it: use float32")
    if before is not None:
        display.note(f"{'going on from' if before.position.step < run.steps else 'finished:'} {before.path}")
    elif run.start is not None:
        display.note(f"starting from the weights of {run.start}")


@dataclass(slots=True)
class _Training:
    """All that a run consists of while it goes on."""

    run: RunConfig
    objective: Objective
    inputs: Inputs
    optimizers: Optimizers
    position: Position
    sample: Sample | None
    display: Display
    signals: Signals
    log: MetricsLog

    @property
    def model(self) -> LanguageModel:
        return self.objective.model

    @property
    def loader(self) -> Batches:
        return self.inputs.batches

    def to_the_end(self) -> Result:
        run, position, heldout, begun = self.run, self.position, None, self.position.step
        self.model.activation_checkpointing = run.activation_checkpointing
        if run.compile:
            self.compile()
        self.objective.train()
        while position.step < run.steps:
            self.one_step()
            heldout = self.evaluate() if self.due(run.eval_every, at_end=True) else None
            if self.sample and self.inputs.tokenizer and self.due(run.sample_every, at_end=False):
                self.show_sample(self.sample, self.inputs.tokenizer)
            if self.signals.received or self.due(run.save_every, at_end=True):
                self.save()
            if self.signals.received and position.step < run.steps:
                raise self.interrupted()
        self.objective.eval()
        checkpoint = latest(Path(run.folder))
        assert checkpoint is not None
        heldout = heldout or self.heldout()  # the run had come to its end before
        return Result(
            Path(run.folder),
            checkpoint,
            self.model,
            self.inputs.tokenizer,
            position.step,
            position.tokens,
            position.seconds,
            heldout,
            position.step - begun,
        )

    def compile(self) -> None:
        """Equal slots share their graphs, in training and in evaluation; all are kept in one place, which is made for a single
        function: without more room the slots that come last would run as they are."""
        config: Any = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, 4 * len(self.model.slots))
        for slot in self.model.slots:
            slot.compile()

    def due(self, every: int, *, at_end: bool) -> bool:
        step = self.position.step
        return (every > 0 and step % every == 0) or (at_end and step == self.run.steps)

    def one_step(self) -> None:
        run, position, started = self.run, self.position, time.perf_counter()
        batch = next(self.loader)
        stats: Stats = {}
        with self.solving(f"step {position.step + 1}"):
            loss = backward(self.objective, batch, run.accumulate, run.precision, stats).item()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), run.clip or math.inf).item()
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise self.not_finite(f"step {position.step + 1}: {name} is {value}", batch)
        position.step += 1
        lr = self.optimizers.step(position.step)
        seconds = time.perf_counter() - started
        position.tokens += batch.inputs.numel()
        position.seconds += seconds
        record = {
            "step": position.step,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens": position.tokens,
            "step_s": seconds,
            "tokens_per_s": batch.inputs.numel() / seconds,
        }
        layers = read(stats)
        self.log.write(**record, **({"solver": as_data(layers)} if layers else {}))
        self.display.step(position.step, record)
        self.display.solved(position.step, layers)

    def heldout(self) -> HeldOut:
        with self.solving(f"held-out text after step {self.position.step}"):
            return self.inputs.measure(self.objective)

    def evaluate(self) -> HeldOut:
        heldout, step = self.heldout(), self.position.step
        if not math.isfinite(heldout.loss):
            raise self.not_finite(f"after step {step}: held-out loss is {heldout.loss}", next(self.loader))
        if not heldout.tokens:
            return heldout
        layers = {"solver": as_data(heldout.layers)} if heldout.layers else {}
        text = {"bits_per_byte": heldout.bits_per_byte} if heldout.bytes else {}
        self.log.write(step=step, heldout_loss=heldout.loss, **text, **layers)
        said = f"  {heldout.bits_per_byte:.4f} bits/byte" if heldout.bytes else ""
        self.display.note(f"step {step}  held-out loss {heldout.loss:.4f}{said}")
        return heldout

    def show_sample(self, sample: Sample, tokenizer: Tokenizer) -> None:
        self.objective.eval()
        with self.solving(f"sample after step {self.position.step}"):
            text = sample(self.model, tokenizer, self.run.sample_prompt)
        self.objective.train()
        self.log.write(step=self.position.step, sample=text)
        self.display.note(f"step {self.position.step}  sample: {text}")

    def save(self) -> None:
        step = self.position.step
        if not weights_finite(self.model):
            raise self.not_finite(f"after step {step}: a weight is not finite", next(self.loader))
        try:
            self.log.sync()
            tokenizer = self.inputs.tokenizer
            path = save_checkpoint(self.run, self.position, self.model, tokenizer, self.optimizers, self.loader)
        except (OSError, SafetensorError) as error:
            raise self.stopped(SaveFailed, f"step {step} could not be saved ({error})") from None
        self.display.note(f"step {step}  saved {path}")

    @contextmanager
    def solving(self, what: str) -> Iterator[None]:
        """Stop the run where a strict layer gives up."""
        try:
            yield
        except NotConverged as error:
            raise self.stopped(Unsolved, f"{what}: {error}") from None

    def not_finite(self, what: str, batch: Any) -> TrainingStopped:
        place = first_nonfinite(self.objective, batch, self.run.precision)
        return self.stopped(NonFinite, f"{what}; the first value that is not finite is in {place}")

    def interrupted(self) -> Interrupted:
        folder, step = Path(self.run.folder), self.position.step
        return Interrupted(f"stopped at step {step}, saved; to go on: plait train {folder}", folder, latest(folder))

    def stopped(self, kind: type[TrainingStopped], message: str) -> TrainingStopped:
        folder = Path(self.run.folder)
        good = latest(folder)
        where = f"the last good checkpoint is {good}" if good else "no checkpoint had been saved"
        return kind(f"{message}; {where}", folder, good)


def _open_folder(run: RunConfig) -> Checkpoint | None:
    """The checkpoint to go on from, after clearing what a killed run left half-written."""
    folder = Path(run.folder)
    remove_leftovers(folder)
    newest = latest(folder)
    if newest is None:
        if run.resume is True:
            raise ValueError(f"{folder}: no checkpoint to go on from; leave out resume=true to start")
        return None
    if run.resume is False:
        raise ValueError(
            f"{folder} has a checkpoint, {newest.name}: give another folder, or resume=auto to go on from it"
        )
    before = Checkpoint.open(newest)
    if before.position.step > run.steps:
        raise ValueError(
            f"{folder} has done {before.position.step} steps, more than steps={run.steps}: give at least as many, or "
            "another folder"
        )
    return before
