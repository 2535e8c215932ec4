"""Logits of flash-linear-attention's own models, for tests that run without it: tests/hub/fla.json.

    pip install --no-deps flash-linear-attention fla-core einops
    TRITON_INTERPRET=1 python benchmarks/fla_logits.py

Its kernels run in Triton's interpreter, in float32 and on a CPU. Weights and tokens are a formula of their number and place
(`plait.hub.parity.formula`), so that the file holds names, shapes and logits alone.
"""

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import torch
from triton.runtime import autotuner

autotuner.Autotuner._bench = lambda self, *args, config, **meta: [
    1.0,
    1.0,
    1.0,
]  # there is nothing to time: take the first

import fla  # noqa: E402, F401 (registers its models)
from transformers import CONFIG_MAPPING, AutoModelForCausalLM  # noqa: E402

from plait.hub.families import FLA, family  # noqa: E402
from plait.hub.parity import formula  # noqa: E402

SEEDS, LENGTHS = range(4), (13, 40)  # from 64 tokens on its layers go in chunks, which the interpreter cannot run
DIGITS = 9
PAGE = Path(__file__).parent.parent / "tests" / "hub" / "fla.json"


@torch.no_grad()
def logits(name: str, seed: int, length: int) -> dict[str, Any]:
    config = family(name).tiny(Random(seed))
    full = CONFIG_MAPPING[name](**config, fuse_cross_entropy=False)
    model = AutoModelForCausalLM.from_config(full, dtype=torch.float32).eval()
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    for key, shape in shapes.items():
        model.get_parameter(key).copy_(formula(key, shape))
    tokens = (torch.arange(length) ** 2 * 7 + 3) % config["vocab_size"]
    last = model(tokens[None], use_cache=False).logits[0, -5:]  # what all before led to
    assert math.isfinite(last.sum())
    rounded = [[round(value, DIGITS) for value in row] for row in last.tolist()]
    return {"family": name, "config": config, "shapes": shapes, "tokens": tokens.tolist(), "logits": rounded}


def main() -> None:
    found = []
    for name in FLA:
        for seed in SEEDS:
            found.append(logits(name, seed, LENGTHS[seed % len(LENGTHS)]))
            print(name, seed, flush=True)
    PAGE.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in found) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
