"""A family of transformers and what plait reads of it, side by side: the same numbers on every path.

Each law takes a model of transformers with random weights and the model that plait read from its folder. Theirs is asked one
row of one text at a time, whole, which is the one way in which every family of theirs is right.
"""

import contextlib
import io
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import logging

from plait.hub.advice import without_advice
from plait.hub.checkpoint import export, is_alias, read
from plait.hub.families import TRANSFORMERS, family

TOLERANCE = 2e-5  # of the largest logit, in float32: sums in another order, over a few layers
LENGTH, STEPS = 40, 16
NOISE = 0.05  # on all that is saved, so that norms are not ones, biases not zeros and gates not all alike


@dataclass(frozen=True)
class Pair:
    """The same weights in two libraries, and a text."""

    theirs: Any
    ours: Any
    folder: Path
    tokens: Tensor  # (LENGTH,)

    def expected(self, tokens: Tensor) -> Tensor:
        return self.theirs(input_ids=tokens[None], use_cache=False).logits[0]


def pair(name: str, seed: int, folder: Path) -> Pair:
    """A small model of the family with a config drawn by `seed`, in float32."""
    config = CONFIG_MAPPING[family(name).model_type](**family(name).tiny(Random(seed)))
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        for key, tensor in theirs.state_dict().items():
            # what a model makes anew when it is read stays that
            if not any(re.fullmatch(alias, key) for alias in family(name).aliases):
                tensor += NOISE * torch.randn_like(tensor)
        tokens = torch.randint(config.vocab_size, (LENGTH,))
        theirs.save_pretrained(folder)
    return Pair(theirs, read(folder), folder, tokens)


def whole(pair: Pair) -> float:
    """One text at once."""
    return _apart(pair.ours(pair.tokens[None])[0][0], pair.expected(pair.tokens))


def steps(pair: Pair) -> float:
    """A prompt, and then token by token."""
    logits, state = pair.ours(pair.tokens[None, :-STEPS], pair.ours.init_state(batch=1))
    found = [logits[0]]
    for token in pair.tokens[-STEPS:]:
        logits, state = pair.ours(token[None, None], state)
        found.append(logits[0])
    return _apart(torch.cat(found), pair.expected(pair.tokens))


def packed(pair: Pair) -> float:
    """Three texts end to end."""
    cuts = [0, 7, 8, LENGTH]
    logits = pair.ours(pair.tokens[None], cu_seqlens=torch.tensor(cuts, dtype=torch.int32))[0][0]
    return max(_apart(logits[a:b], pair.expected(pair.tokens[a:b])) for a, b in zip(cuts, cuts[1:], strict=False))


def padded(pair: Pair) -> float:
    """Rows of unlike lengths, padded on the left."""
    lengths = [LENGTH, 5, 23]
    rows = torch.zeros(len(lengths), LENGTH, dtype=torch.long)
    mask = torch.zeros_like(rows)
    for row, length in enumerate(lengths):
        rows[row, LENGTH - length :], mask[row, LENGTH - length :] = pair.tokens[:length], 1
    logits = pair.ours(rows, attention_mask=mask)[0]
    return max(_apart(logits[i, LENGTH - n :], pair.expected(pair.tokens[:n])) for i, n in enumerate(lengths))


def greedy(pair: Pair) -> float:
    """The same 32 tokens after a prompt; the share that is not."""
    prompt, count = pair.tokens[:8], 32
    text = prompt
    logits, state = pair.ours(prompt[None], pair.ours.init_state(batch=1))
    wrong = 0
    for _ in range(count):
        expected, found = pair.expected(text)[-1].argmax(), logits[0, -1].argmax()
        wrong += int(found != expected)
        text = torch.cat([text, expected[None]])
        logits, state = pair.ours(expected[None, None], state)
    return wrong / count


def returned(pair: Pair) -> float:
    """Written again: the same tensors to the bit (but for what a model makes anew), the same config, and transformers reads it;
    the largest difference. Once as what it was read from, and once as a model of plait's own that is to be of this family."""
    found = family(pair.theirs.config.model_type)
    folder = pair.folder / "returned"
    export(pair.ours, folder)
    after, stored = load_file(folder / "model.safetensors"), load_file(pair.folder / "model.safetensors")
    before = {name: x for name, x in stored.items() if not is_alias(name, found, pair.ours.design)}
    if before.keys() != after.keys():
        raise ValueError(f"tensors differ: {sorted(before.keys() ^ after.keys())[:3]}")
    with quiet():
        again = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    config, was = again.config.to_dict(), pair.theirs.config.to_dict()
    changed = [key for key in was if key != "_name_or_path" and config.get(key) != was[key]]
    if changed:
        raise ValueError(f"config.{changed[0]} is {config.get(changed[0])!r}, was {was[changed[0]]!r}")
    if not all(torch.equal(before[name], after[name]) for name in before):
        raise ValueError("a tensor is not what it was")
    expected = pair.expected(pair.tokens)
    return max(_apart(again(input_ids=pair.tokens[None], use_cache=False).logits[0], expected), _written(pair))


def _written(pair: Pair) -> float:
    """How far from theirs what transformers makes of it is once plait has to say by itself what the model is."""
    folder, origin = pair.folder / "written", pair.ours.origin
    assert origin is not None
    pair.ours.origin = None
    export(pair.ours, folder, origin["family"])
    pair.ours.origin = origin
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return _apart(theirs(input_ids=pair.tokens[None], use_cache=False).logits[0], pair.expected(pair.tokens))


LAWS: dict[str, Callable[[Pair], float]] = {
    "whole": whole,
    "steps": steps,
    "packed": packed,
    "padded": padded,
    "greedy": greedy,
    "returned": returned,
}


@dataclass(frozen=True)
class Parity:
    """How far apart one law found the two; `message` is empty where it holds."""

    family: str
    seed: int
    law: str
    error: float
    message: str


@torch.no_grad()
def parity(names: Sequence[str] = TRANSFORMERS, seeds: Sequence[int] = (0, 1, 2)) -> Iterator[Parity]:
    """Every law on models of each family, one config for each seed."""
    for name in names:
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                models = pair(name, seed, Path(folder))
                for law, check in LAWS.items():
                    yield _checked(name, seed, law, check, models)


def _checked(name: str, seed: int, law: str, check: Callable[[Pair], float], models: Pair) -> Parity:
    try:
        error = check(models)
    except Exception as crash:  # a law that cannot be asked is a finding, not the end of the table
        return Parity(name, seed, law, float("inf"), f"{type(crash).__name__}: {' '.join(str(crash).split())[:300]}")
    holds = error <= TOLERANCE
    return Parity(
        name, seed, law, error, "" if holds else f"{error:.1e} of the largest logit, tolerance {TOLERANCE:.0e}"
    )


def formula(name: str, shape: Sequence[int]) -> Tensor:
    """Weights that anyone can make again, to the bit: spread evenly in (-0.3, 0.3), and of norms in (0.7, 1.3)."""
    number = torch.arange(prod(shape), dtype=torch.long) + crc32(name.encode())
    spread = (number * 2654435761 % 2**20).to(torch.float32) / 2**20 - 0.5
    return (0.6 * spread + ("norm" in name and name.endswith("weight"))).view(*shape)


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, of the largest value."""
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    return error if error == error else float("inf")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without their progress bars and advice."""
    logging.disable_progress_bar()
    try:
        with without_advice(), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.enable_progress_bar()
