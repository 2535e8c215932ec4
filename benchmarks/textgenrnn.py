"""textgenrnn, a pretrained pair of LSTMs under an attention average (MIT, Max Woolf), as a plait design.

    python benchmarks/textgenrnn.py FOLDER [--texts 5] [--out benchmarks/results/textgenrnn.json]

FOLDER holds `textgenrnn_weights.hdf5` and `textgenrnn_vocab.json` of textgenrnn 2.0.0; h5py reads them.

The original reads the last 40 characters, padded on the left: embedding (100) -> LSTM (128) -> LSTM (128) -> the mean of all,
side by side, under softmax(w . x) over the 40 places -> softmax over 465 characters. Here its stream is 712 wide: what
layers read lies in the first 356 channels, each layer writes into its own, and the mean into the rest, which the head
reads. It is compared with the same in torch.nn.LSTM, which nobody here wrote: logits, and texts written by both.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import h5py
import torch
from torch import Tensor, nn

import plait
from plait.evaluate.machine import machine
from plait.layers.recurrent import RecurrentCell

E, K, WINDOW = 100, 128, 40  # embedding, units, characters that it looks back
WIDE = E + 2 * K

DESIGN = plait.ModelConfig(
    vocab=465,
    dim=2 * WIDE,
    pattern="HHA",
    layers={
        "H": plait.LSTM(
            heads=1, head_dim=K, recurrence="dense", conv_width=None, output_gate=False, recurrent_bias=True
        ),
        "A": plait.Attention(heads=1, head_dim=WIDE, window=WINDOW, rope=None, scale=1.0, bias=("q",)),
    },
    wrap=plait.Wrap(norms="none"),
    norm=plait.RMSNorm(eps=1e12),  # the model's last norm, with a weight of 1e6: x (1 - |x|^2 / 2e12 d), which is x
    head=plait.Logits(bias=True),
    tie_embeddings=False,
)


class Original(nn.Module):
    """The published network in torch's own layers."""

    def __init__(self, file: Any):
        super().__init__()
        read = lambda name: torch.tensor(file[name][()])  # noqa: E731
        self.embed = nn.Embedding.from_pretrained(read("embedding/embedding/embeddings:0"))
        self.lstms = nn.ModuleList(_lstm(read, f"rnn_{i}/rnn_{i}/", inputs) for i, inputs in ((1, E), (2, K)))
        tensors = {
            "w": "attention/attention/attention_W:0",
            "matrix": "output/output/kernel:0",
            "bias": "output/output/bias:0",
        }
        for name, place in tensors.items():  # (356, 1), (356, 465), (465,)
            self.register_buffer(name, read(place))

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (b, vocab) after 40 characters (b, 40)."""
        parts = [self.embed(tokens)]
        for lstm in self.lstms:
            parts.append(lstm(parts[-1])[0])
        x = torch.cat(parts, -1)
        mean = ((x @ self.w).softmax(1) * x).sum(1)
        return mean @ self.matrix + self.bias


def _lstm(read: Any, place: str, inputs: int) -> nn.LSTM:
    """From cuDNN's layout: gates i, f, g, o side by side, the input's matrices flattened the other way round."""
    lstm = nn.LSTM(inputs, K, batch_first=True)
    kernel, recurrent, bias = (read(f"{place}{name}:0") for name in ("kernel", "recurrent_kernel", "bias"))
    into = [_fortran(k) for k in kernel.split(K, 1)]
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(torch.cat(into, 1).T)
        lstm.weight_hh_l0.copy_(torch.cat([k.T for k in recurrent.split(K, 1)], 1).T)
        lstm.bias_ih_l0.copy_(bias[: 4 * K])
        lstm.bias_hh_l0.copy_(bias[4 * K :])
    return lstm.requires_grad_(False)


def _fortran(k: Tensor) -> Tensor:
    """k.T.reshape(k.shape, order="F") in numpy's words."""
    return torch.from_numpy(k.T.numpy().reshape(tuple(k.shape), order="F").copy())


@torch.no_grad()
def converted(original: Original) -> plait.LanguageModel:
    model = plait.build(DESIGN)
    for parameter in model.parameters():
        parameter.zero_()
    model.embed.weight[:, :E] = original.embed.weight
    reads, writes = (slice(E), slice(E, E + K)), (slice(E, E + K), slice(E + K, WIDE))
    for i, lstm in enumerate(original.lstms):
        layer: Any = model.place(f"H#{i}")
        cell = RecurrentCell.from_torch(lstm)
        layer.cell.in_proj.weight[:, reads[i]] = cell.in_proj.weight
        for name in ("R", "recurrent_bias"):
            getattr(layer.cell, name).copy_(getattr(cell, name))
        layer.cell.in_proj.bias.copy_(cell.in_proj.bias)
        layer.out_proj.weight[writes[i]] = torch.eye(K)
    attention: Any = model.place("A#0")
    attention.qkv_proj.bias[0] = 1.0  # q = (1, 0, ...), k = (w . x, 0, ...), v = x
    attention.qkv_proj.weight[WIDE, :WIDE] = original.w[:, 0]
    attention.qkv_proj.weight[2 * WIDE :, :WIDE] = torch.eye(WIDE)
    attention.o_proj.weight[WIDE:] = torch.eye(WIDE)
    model.norm.weight.fill_(1e6)
    model.lm_head.weight[:, WIDE:] = original.matrix.T
    model.lm_head.bias.copy_(original.bias)
    return model.eval()


def write(logits_of: Any, start: int, names: dict[int, str], seed: int, temperature: float = 0.5) -> str:
    """A text as the original writes it, a character at a time from the last 40."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [0] * (WINDOW - 1) + [start]
    for _ in range(120):
        p = (logits_of(torch.tensor([tokens[-WINDOW:]])) / temperature).softmax(-1)
        tokens.append(int(torch.multinomial(p[0], 1, generator=generator)))
        if tokens[-1] in (0, start):
            break
    return "".join(names.get(token, "") for token in tokens[WINDOW:]).removesuffix(names[start])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--texts", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    vocab = json.loads((args.folder / "textgenrnn_vocab.json").read_text(encoding="utf-8"))
    names = {index: name for name, index in vocab.items()}
    with h5py.File(args.folder / "textgenrnn_weights.hdf5") as file:
        original = Original(file)
    model = converted(original)

    @torch.no_grad()
    def ours(tokens: Tensor) -> Tensor:
        return model(tokens)[0][:, -1]

    tokens = torch.randint(465, (64, WINDOW), generator=torch.Generator().manual_seed(0))
    texts = [[write(form, vocab["<s>"], names, seed) for form in (original, ours)] for seed in range(args.texts)]
    original.double(), model.double()  # in float32 either is up to 2e-4 from this: some inputs are close to chaos
    want = original(tokens)
    error = float((ours(tokens) - want).abs().max() / want.abs().max())
    same = sum(a == b for a, b in texts)
    print(
        f"logits in float64 differ by {error:.1e} of the largest; {same} of {len(texts)} texts are the same: {texts[0][1]!r}"
    )
    result = {
        "machine": machine(),
        "error_float64": error,
        "texts": len(texts),
        "same": same,
        "first": [b for _, b in texts],
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"wrote {args.out}")
    if error > 1e-9 or same < len(texts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
