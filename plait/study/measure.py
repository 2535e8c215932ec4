"""What a study measures of each trained model."""

from plait.data import load_tokenizer
from plait.design.count import parameters, state_bytes
from plait.engine import generate
from plait.evaluate.speed import speeds
from plait.model import model_folder
from plait.opening import load
from plait.run_folder import METRICS
from plait.study.config import Study
from plait.study.results import ModelResult
from plait.train import RunConfig
from plait.train.metrics import read_metrics


def measure(study: Study, name: str, run: RunConfig) -> ModelResult:
    """Everything in a `ModelResult`, of a run that is finished."""
    folder = model_folder(run.folder)
    model, tokenizer = load(folder), load_tokenizer(folder)
    history = read_metrics(folder.parent.parent / METRICS)
    steps = [record for record in history if "loss" in record]
    scores = [record for record in history if "heldout_loss" in record]
    tokens_at = {record["step"]: record["tokens"] for record in steps}
    sample = generate(
        model,
        tokenizer,
        study.sample_prompt,
        max_tokens=study.sample_tokens,
        temperature=study.sample_temperature,
        seed=0,
    )
    return ModelResult(
        name=name,
        pattern=model.design.pattern,
        folder=run.folder,
        parameters=parameters(model.design),
        bits_per_byte=scores[-1]["bits_per_byte"],
        train_tokens=steps[-1]["tokens"],
        train_seconds=sum(record["step_s"] for record in steps),
        decode_ms={speed.context: speed.decode_ms for speed in speeds(model, study.decode_contexts)},
        state_bytes={context: state_bytes(model.design, context) for context in study.state_contexts},
        losses=[(record["tokens"], record["loss"]) for record in steps],
        heldout=[(tokens_at[record["step"]], record["heldout_loss"]) for record in scores],
        prompt=study.sample_prompt,
        sample=sample,
    )
