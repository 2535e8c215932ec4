"""Training, from a config to a trained model in a folder."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor, nn

from plait.data import Tokenizer
from plait.design import Logits, ModelConfig
from plait.files import write_text
from plait.layers import Channels
from plait.model import LanguageModel, NextToken, Objective, build
from plait.model.device import find_device
from plait.opening import adaptable, load
from plait.ops.instructions import fast_dtype
from plait.ops.shooting import NotConverged
from plait.run_folder import METRICS, RUN, latest, remove_leftovers
from plait.train.ahead import Ahead
from plait.train.balance import rebalance
from plait.train.checkpoint import Checkpoint, Position, save_checkpoint
from plait.train.config import RunConfig, from_folder, to_yaml
from plait.train.delay import asleep, begins, without
from plait.train.display import Display
from plait.train.errors import Ended, Interrupted, NonFinite, SaveFailed, TrainingStopped, Unsolved
from plait.train.guard import first_nonfinite, weights_finite
from plait.train.heldout import HeldOut
from plait.train.inputs import Batches, Inputs, own_inputs, text_inputs
from plait.train.late import Late
from plait.train.lock import alone_in
from plait.train.metrics import Log, MetricsLog, NoLog
from plait.train.optim import Optimizers
from plait.train.ranks import One, Ranks, reduce_stats
from plait.train.rates import frozen, rates
from plait.train.result import Result
from plait.train.signals import Signals
from plait.train.solver import STAT, as_data, records
from plait.train.step import backward, compile_slots, models_of

Sample = Callable[[LanguageModel, Tokenizer, str], str]


def train(
    run: RunConfig,
    *,
    objective: Callable[[LanguageModel], Objective] = NextToken,
    batches: Batches | None = None,
    heldout: Callable[[], Iterable[Any]] | None = None,
    sample: Sample | None = None,
    console: Console | None = None,
    ranks: Ranks | None = None,
) -> Result:
    """Train, or go on training, what `run` describes, in `run.folder`; see `RunConfig.resume`.

    `objective(model)` gives what steps optimise, a `plait.model.Objective`: next tokens, or one's own.
    `batches` stand in for the text of `run.data`, and `heldout()` gives those to measure on.
    `sample(model, tokenizer, prompt)` gives the text that is shown and logged every `sample_every` steps.
    `console` is where progress goes: standard error unless given; `Console(quiet=True)` for none.
    `ranks` are the processes that train this run together, each of which calls this with `plait.train.ranks.Distributed()`;
    one unless given.
    Raises ValueError and OSError for a run that cannot begin, and TrainingStopped for one that had to stop, which is
    Interrupted, NonFinite, Unsolved, SaveFailed or Ended. In each case the checkpoints written before are whole.
    """
    if not isinstance(run, RunConfig):
        raise TypeError(f"expected a RunConfig, which plait.train.load_run reads from a file, got {type(run).__name__}")
    folder, ranks = Path(run.folder), ranks or One()
    writes = ranks.rank == 0
    console = (console or Console(stderr=True)) if writes else Console(quiet=True)
    with Display(console, run.steps) as display, alone_in(folder) if writes else nullcontext():
        with ranks.in_turn():
            before = _open_folder(run)
            if batches is not None:
                inputs = own_inputs(run, batches, heldout)
            else:
                inputs = text_inputs(run, before and folder / "tokenizer", ranks, display.reading)
        check_head(inputs.design, objective)
        run = run.replace(design=inputs.design.to_dict())
        device, delayed = find_device(run.device), begins(run, inputs.design)
        if before is None:
            torch.manual_seed(run.seed)
            model, position = first_model(run, inputs.design, device), Position()
        else:
            before.check_same_run(run, inputs.batches)
            model, position = before.load_model(run, device), before.position
        optimizers = Optimizers(model, run)
        if before is not None:
            before.restore(optimizers, inputs.batches)
        introduce(display, run, model, inputs, before, delayed)
        if writes and position.step < run.steps:  # else nothing will happen here, and the run stays what it was
            if inputs.tokenizer is not None:
                inputs.tokenizer.save(folder / "tokenizer")
            write_text(folder / RUN, to_yaml(stored(run)))
        with Signals() as signals, MetricsLog(folder / METRICS, position.step) if writes else NoLog() as log:
            broken, steps = torch.zeros((), device=model.device), run.steps - position.step
            ahead = Ahead(inputs.batches, steps if inputs.ahead else 0, run.accumulate, model.device)
            with ahead as loader, frozen(model, rates(model, run.rates)):
                return _Training(
                    run,
                    objective(model),
                    inputs,
                    loader,
                    optimizers,
                    position,
                    sample,
                    display,
                    signals,
                    log,
                    ranks,
                    delayed,
                    broken,
                ).to_the_end()


def check_head(design: ModelConfig, objective: Callable[[LanguageModel], Objective]) -> None:
    """Raise ValueError for next tokens by a head that gives vectors."""
    if objective is NextToken and not isinstance(design.head, Logits):
        raise ValueError(
            "design.head: this model gives vectors, not logits of next tokens: give an `objective` for them"
        )


def first_model(run: RunConfig, design: ModelConfig, device: torch.device) -> LanguageModel:
    """The model that step 1 begins with: new weights, or those of `run.start`."""
    if run.start is None:
        return build(design, seed=run.seed, device=device)
    float32 = torch.float32
    model = load(run.start, device, float32) if run.lora is None else adaptable(run.start, run.lora, device)
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
    display: Display,
    run: RunConfig,
    model: LanguageModel,
    inputs: Inputs,
    before: Checkpoint | None,
    delayed: dict[str, int],
) -> None:
    """What is about to be done: the model, the device, the text, the folder."""
    device, count = model.device, sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    alone = f", of which {trained:,} are trained" if run.lora is not None else ""
    display.note(
        f"{model.design.pattern}: {count:,} parameters{alone}, {run.precision} on {device}; folder {run.folder}"
    )
    display.note(inputs.summary)
    if run.precision == "bfloat16" and fast_dtype(device) != torch.bfloat16:
        display.note(f"precision bfloat16 is slow on this {device.type}, which has no instructions for it: use float32")
    if never := [address for address, first in delayed.items() if first >= run.steps]:
        display.note(
            f"delayed: {', '.join(never)} would begin after the last of {run.steps:,} steps, and learn nothing here"
        )
    if before is not None:
        display.note(f"{'going on from' if before.position.step < run.steps else 'finished:'} {before.path}")
    elif run.start is not None:
        display.note(f"starting from the weights of {run.start}")


@dataclass(slots=True)
class _Queued:
    """A step that has been given to the device, and its record but for the numbers that are not there yet."""

    step: int
    batch: Any
    lr: float
    tokens: int  # in this step
    read: int  # up to its end
    seconds: float  # of this process, until it was given to the device
    numbers: Late


@dataclass(slots=True)
class _Training:
    """All that a run consists of while it goes on."""

    run: RunConfig
    objective: Objective
    inputs: Inputs
    loader: Ahead
    optimizers: Optimizers
    position: Position
    sample: Sample | None
    display: Display
    signals: Signals
    log: Log
    ranks: Ranks
    delayed: dict[str, int]  # the step before which a layer adds nothing
    broken: Tensor  # on the device; above 0 from the first step on whose loss or gradient is not finite: weights stay
    queued: _Queued | None = None

    @property
    def model(self) -> LanguageModel:
        return self.objective.model

    def to_the_end(self) -> Result:
        run, position, heldout, begun = self.run, self.position, None, self.position.step
        self.model.activation_checkpointing = run.activation_checkpointing
        if run.compile:
            compile_slots(*models_of(self.objective))
        self.objective.train()
        while position.step < run.steps:
            with without(self.model, asleep(self.delayed, position.step)):
                self.one_step()
                heldout = self.evaluate() if self.due(run.eval_every, at_end=True) else None
                if self.sample and self.inputs.tokenizer and self.due(run.sample_every, at_end=False):
                    self.show_sample(self.sample, self.inputs.tokenizer)
            stop = self.ranks.any(self.signals.received)
            if stop or self.due(run.save_every, at_end=True):
                self.save()
            if stop and position.step < run.steps:
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

    def due(self, every: int, *, at_end: bool) -> bool:
        step = self.position.step
        return (every > 0 and step % every == 0) or (at_end and step == self.run.steps)

    def one_step(self) -> None:
        """Queue a step, then read how the one before it went: the device never waits for the host to look."""
        queued = self.queue()
        before, self.queued = self.queued, queued
        if before is not None:
            self.record(before)

    def settle(self) -> None:
        """Read the step that is still queued: after this, what has been done is known, and that it was finite."""
        last, self.queued = self.queued, None
        if last is not None:
            self.record(last)

    def queue(self) -> _Queued:
        """The next step: gradients, and the weights moved by them where all of it is finite."""
        run, position, ranks, started = self.run, self.position, self.ranks, time.perf_counter()
        try:
            ready, channels = next(self.loader), Channels()
        except StopIteration:
            self.settle()
            raise self.stopped(
                Ended, f"batches ended after step {position.step} of {run.steps}: give endless ones"
            ) from None
        batch = ready.batch
        scored, tokens = ranks.sum(int(self.objective.count(batch)), batch.inputs.numel())
        with self.solving(f"step {position.step + 1}"):
            loss, parts = backward(self.objective, batch, ready.parts, run.precision, scored=scored, channels=channels)
        loss, *values = ranks.reduce([loss, *parts.values()], "sum")
        ranks.sum_gradients(self.model.parameters())
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), run.clip or math.inf)
        self.broken = torch.logical_not(loss.isfinite() & norm.isfinite()).float().maximum(self.broken)
        lr = self.optimizers.step(position.step + 1, self.broken)
        position.step, position.tokens = position.step + 1, position.tokens + tokens
        losses, stats = dict(zip(parts, values, strict=True)), reduce_stats(channels, ranks)
        if run.lora is None:  # else the weights below stay as they are
            rebalance(self.model, stats, self.broken)
        numbers = Late({"loss": loss, "gradient norm": norm, "losses": losses, "stats": stats})
        seconds = time.perf_counter() - started
        return _Queued(position.step, batch, lr, tokens, position.tokens, seconds, numbers)

    def record(self, queued: _Queued) -> None:
        """Wait for a step's numbers, then write them down. Raises NonFinite for one that left the weights as they were."""
        started = time.perf_counter()
        numbers = queued.numbers.read()
        seconds = queued.seconds + time.perf_counter() - started
        for name in ("loss", "gradient norm"):
            if not math.isfinite(numbers[name]):
                raise self.not_finite(f"step {queued.step}: {name} is {numbers[name]}", queued.batch)
        self.position.seconds += seconds
        record = {
            "step": queued.step,
            "loss": numbers["loss"],
            "lr": queued.lr,
            "grad_norm": numbers["gradient norm"],
            "tokens": queued.read,
            "step_s": seconds,
            "tokens_per_s": queued.tokens / seconds,
        }
        layers = records(numbers["stats"])
        more = {"losses": numbers["losses"], STAT: as_data(layers), "stats": others(numbers["stats"])}
        self.log.write(**record, **{name: value for name, value in more.items() if value})
        self.display.step(queued.step, record)
        self.display.solved(queued.step, layers)

    def heldout(self) -> HeldOut:
        self.settle()
        with self.solving(f"held-out text after step {self.position.step}"):
            return self.inputs.measure(self.objective)

    def evaluate(self) -> HeldOut:
        heldout, step = self.heldout(), self.position.step
        if not math.isfinite(heldout.loss):
            raise self.not_finite(f"after step {step}: held-out loss is {heldout.loss}", next(self.loader).batch)
        if not heldout.tokens:
            return heldout
        layers = {"solver": as_data(heldout.layers)} if heldout.layers else {}
        text = {"bits_per_byte": heldout.bits_per_byte} if heldout.bytes else {}
        self.log.write(step=step, heldout_loss=heldout.loss, **text, **layers)
        bits = f"  {heldout.bits_per_byte:.4f} bits/byte" if heldout.bytes else ""
        self.display.note(f"step {step}  held-out loss {heldout.loss:.4f}{bits}")
        return heldout

    def show_sample(self, sample: Sample, tokenizer: Tokenizer) -> None:
        self.settle()
        self.objective.eval()
        with self.solving(f"sample after step {self.position.step}"):
            text = sample(self.model, tokenizer, self.run.sample_prompt)
        self.objective.train()
        self.log.write(step=self.position.step, sample=text)
        self.display.note(f"step {self.position.step}  sample: {text}")

    def save(self) -> None:
        self.settle()
        step, path, failed = self.position.step, None, None
        if not weights_finite(self.model):
            raise self.not_finite(f"after step {step}: a weight is not finite", next(self.loader).batch)
        try:
            self.log.sync()
            tokenizer = self.inputs.tokenizer
            if self.ranks.rank == 0:
                place = self.loader.place
                path = save_checkpoint(self.run, self.position, self.model, tokenizer, self.optimizers, place)
        except (OSError, SafetensorError) as error:
            failed = error
        if self.ranks.any(failed is not None):  # the others have waited for it here
            raise self.stopped(SaveFailed, f"step {step} could not be saved ({failed or 'by rank 0'})")
        self.display.note(f"step {step}  saved {path}")

    @contextmanager
    def solving(self, what: str) -> Iterator[None]:
        """Stop the run, on all ranks, where a strict layer gives up on any."""
        gave_up = None
        try:
            yield
        except NotConverged as error:
            gave_up = error
        if self.ranks.any(gave_up is not None):
            self.settle()
            raise self.stopped(Unsolved, f"{what}: {gave_up or 'a layer of another rank gave up'}") from None

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


def others(stats: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What layers say besides how they were solved, by address and name."""
    found: dict[str, dict[str, Any]] = {}
    for address, own in stats.items():
        for name, value in own.items():
            if name != STAT:
                named = isinstance(value, tuple)
                found.setdefault(address, {})[name] = value._asdict() if named else value  # pyright: ignore[reportAttributeAccessIssue]
    return found


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
