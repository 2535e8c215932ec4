"""What a study measures of each trained model."""

from plait.design.count import parameters, state_bytes
from plait.engine import generate
from plait.evaluate.speed import speeds
from plait.study.config import Study
from plait.study.results import ModelResult
from plait.train import Result


def measure(study: Study, name: str, result: Result) -> ModelResult:
    """Everything in a `ModelResult`, of a model just trained."""
    model, design = result.model, result.model.design
    history = result.history
    tokens_at = {record["step"]: record["tokens"] for record in history if "loss" in record}
    sample = generate(
        model,
        result.tokenizer,
        study.sample_prompt,
        max_tokens=study.sample_tokens,
        temperature=study.sample_temperature,
        seed=0,
    )
    return ModelResult(
        name=name,
        pattern=design.pattern,
        folder=str(result.folder),
        parameters=parameters(design),
        bits_per_byte=result.heldout.bits_per_byte,
        heldout_tokens=result.heldout.tokens,
        heldout_bytes=result.heldout.bytes,
        train_tokens=result.tokens,
        train_seconds=result.seconds,
        decode_ms={speed.context: speed.decode_ms for speed in speeds(model, study.decode_contexts)},
        state_bytes={context: state_bytes(design, context) for context in study.state_contexts},
        losses=[(record["tokens"], record["loss"]) for record in history if "loss" in record],
        heldout=[(tokens_at[record["step"]], record["heldout_loss"]) for record in history if "heldout_loss" in record],
        prompt=study.sample_prompt,
        sample=sample,
    )
