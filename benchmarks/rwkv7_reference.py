"""The pretrained RWKV-7 of 834K parameters, as a plait design, writes the logits that its authors' implementation writes.

    python benchmarks/rwkv7_reference.py FOLDER

FOLDER holds `tiny-rwkv-7v0-834K-FP32.bin` and `expected-logits-7v0-834K.bin` of RWKV/rwkv.cpp (tests/, MIT). The whole prompt
in one call, and token by token; ends non-zero where a logit is further off than 1e-5.
"""

import struct
import sys
from math import prod
from pathlib import Path

import torch
from torch import Tensor

import plait

MODEL, LOGITS = "tiny-rwkv-7v0-834K-FP32.bin", "expected-logits-7v0-834K.bin"
PROMPT = b'"in'
TOLERANCE = 1e-5
LAYERS, DIM, VOCAB = 12, 64, 256

MIXING = {
    "receptance": "r_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "out_proj",
    "ln_x": "norm",
    **{f"{name}1": f"{name}_down" for name in "wavg"},
    **{f"{name}2": f"{name}_up" for name in "wavg"},
}
PER_CHANNEL = ("w0", "a0", "v0", "k_k", "k_a", "r_k")


def read(path: Path) -> dict[str, Tensor]:
    """Tensors of rwkv.cpp's format in float32: a header, then sizes, name and data of each."""
    data, place, tensors = path.read_bytes(), 24, {}
    while place < len(data):
        count, length, kind = struct.unpack_from("<3I", data, place)
        sizes = struct.unpack_from(f"<{count}I", data, place + 12)[::-1]
        place += 12 + 4 * count
        name = data[place : place + length].decode()
        if kind != 0:
            raise ValueError(f"{path}: {name} is of type {kind}, not float32")
        place += length
        tensors[name] = torch.frombuffer(bytearray(data[place : place + 4 * prod(sizes)]), dtype=torch.float32).view(
            sizes
        )
        place += 4 * prod(sizes)
    return tensors


def design() -> plait.ModelConfig:
    return plait.ModelConfig(
        vocab=VOCAB,
        dim=DIM,
        pattern=f"(RwRf){LAYERS}",
        norm=plait.LayerNorm(eps=1e-5),
        front=plait.Tokens(norm=True),
        at={"Rw#0": {"value_residual": False}},
        tie_embeddings=False,
    )


def weights(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under our names."""
    ours = {"embed.weight": theirs["emb.weight"], "lm_head.weight": theirs["head.weight"]}
    for name, here in {"ln_out": "norm", "blocks.0.ln0": "embed_norm"}.items():
        ours |= {f"{here}.{leaf}": theirs[f"{name}.{leaf}"] for leaf in ("weight", "bias")}
    for name, x in theirs.items():
        parts = name.split(".")
        if parts[0] != "blocks" or parts[2] == "ln0":
            continue
        block, part, what, *leaf = parts[1:]
        slot = f"slots.{2 * int(block) + (part in ('ffn', 'ln2'))}."
        if part in ("ln1", "ln2"):
            ours[f"{slot}norm.{what}"] = x
        elif what == "x_rwkvag":
            ours |= {f"{slot}mixer.x_{channel}": row for channel, row in zip("rwkvag", x.flatten(1), strict=True)}
        elif part == "ffn":
            ours[
                slot + {"x_k": "mixer.x_k", "key": "mixer.up_proj.weight", "value": "mixer.down_proj.weight"}[what]
            ] = x.flatten() if what == "x_k" else x
        elif what in PER_CHANNEL:
            ours[f"{slot}mixer.{what}"] = x.flatten()
        else:
            ours[f"{slot}mixer.{MIXING[what]}.{leaf[0] if leaf else 'weight'}"] = x
    return ours


@torch.no_grad()
def main(folder: Path) -> int:
    model = plait.build(design())
    model.load_state_dict(weights(read(folder / MODEL)))
    want = torch.frombuffer(bytearray((folder / LOGITS).read_bytes()), dtype=torch.float32)
    tokens = torch.tensor([list(PROMPT)])
    whole, state = model(tokens)[0][0, -1], model.init_state(1)
    for token in tokens.split(1, 1):
        logits, state = model(token, state)
    errors = [float((x - want).abs().max()) for x in (whole, logits[0, -1])]
    print(f"largest difference of {VOCAB} logits: {errors[0]:.1e} in one call, {errors[1]:.1e} token by token")
    return int(max(errors) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
