"""A recurrent cell of one's own, trained on parity: after each token, was the number of ones so far odd?

A sum modulo two needs a state that an input can turn around. The cell below has one: h = tanh(a h + b), where the input
says both what is kept of h, with either sign, and what is added. It is written as one step of one unit; solving it in
parallel over time, packing, states, gradients and `plait train` come from the library.

    python examples/own_cell.py
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import plait


@dataclass(frozen=True)
class Turn(plait.Cell):
    """h = tanh(gain (a h + b)). A larger gain keeps signs for longer."""

    gain: float = 2.0

    inputs = ("a", "b")

    def step(self, x, m, s, w):
        a, b = x[0] + m[0], x[1] + m[1]
        return (torch.tanh(self.gain * (a * s[0] + b)),)


def parity(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    bits = torch.randint(2, (rows, length))
    return bits, bits.cumsum(1) % 2


def train(steps: int = 100, length: int = 32) -> plait.LanguageModel:
    design = plait.ModelConfig(vocab=2, dim=64, pattern="ZF")
    model = plait.build(design)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, steps + 1):
        bits, odd = parity(32, length)
        loss = F.cross_entropy(model(bits)[0].flatten(0, 1), odd.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step:>4}  loss {loss.item():.4f}")
    return model


@torch.no_grad()
def right(model: plait.LanguageModel, length: int) -> tuple[float, int]:
    """The share of right answers, and the passes that the solver needed."""
    bits, odd = parity(32, length)
    sent = plait.Channels()
    answers = model(bits, channels=sent)[0].argmax(-1)
    return (answers == odd).float().mean().item(), int(sent.stats["Z#0"]["solver"].passes)


def main() -> float:
    torch.manual_seed(0)
    plait.register("Z", Turn, conv_width=None)
    model = train()
    for length in (32, 256, 2048):
        share, passes = right(model, length)
        print(f"{length:>5} tokens: {share:.1%} right, {passes} passes over the sequence")
    return share


if __name__ == "__main__":
    main()
