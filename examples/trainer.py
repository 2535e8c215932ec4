"""A plait model trained by transformers' Trainer: label smoothing, gradient checkpointing, and a run that is taken up again.

    python examples/trainer.py [FOLDER]

Needs accelerate (`pip install accelerate`), as every Trainer does. It takes a few seconds on a CPU, and nothing is fetched.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments, default_data_collator

import plait
import plait.hub

TEXT = "the sun rose and the sun set and the moon rose and the moon set and " * 40
LENGTH = 64


def start(folder: Path) -> tuple[plait.hub.PlaitForCausalLM, Any]:
    """A fresh model and its tokenizer, by way of a saved folder, as with any other model of transformers."""
    design = plait.ModelConfig(vocab=257, dim=64, pattern="DF AF")
    plait.save(plait.build(design), folder, plait.load_tokenizer("bytes"))
    return plait.hub.PlaitForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def blocks(tokenizer, text: str) -> list[dict[str, list[int]]]:
    """Equal blocks of text. Labels are the ids themselves: model and Trainer shift them."""
    ids = tokenizer(text)["input_ids"]
    whole = [ids[first : first + LENGTH] for first in range(0, len(ids) - LENGTH + 1, LENGTH)]
    return [{"input_ids": block, "labels": list(block)} for block in whole]


def train(folder: Path, model, tokenizer, steps: int, resume: bool = False) -> Trainer:
    options = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=10,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=8,
        label_smoothing_factor=0.1,
        gradient_checkpointing=True,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=options,
        train_dataset=blocks(tokenizer, TEXT),
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def main(folder: Path) -> str:
    model, tokenizer = start(folder / "start")
    train(folder / "run", model, tokenizer, steps=10)  # as if stopped here
    again = plait.hub.PlaitForCausalLM.from_pretrained(folder / "start")
    trainer = train(folder / "run", again, tokenizer, steps=60, resume=True)
    trainer.save_model(str(folder / "trained"))
    trained = folder / "trained"  # a plait folder like any other
    return plait.generate(plait.load(trained), plait.load_tokenizer(trained), "the sun ", max_tokens=40)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(main(Path(sys.argv[1])))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            print(main(Path(temporary)))
