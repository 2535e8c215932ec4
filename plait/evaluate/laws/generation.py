"""Law 16: what is written is what the model says, by whatever kernels it decodes."""

import torch

from plait.design.ends import Logits, Tokens
from plait.design.model import ModelConfig
from plait.engine.decode import generate_tokens
from plait.evaluate.laws.compare import agree, some_tokens, subject

LENGTHS, NEW = (9, 1, 20), 5


@torch.no_grad()
def greedy(design: ModelConfig, device: str, dtype: torch.dtype) -> float:
    """16: each token that is generated, for a row alone and for several, is one that the whole forward pass finds likeliest."""
    law, model = "greedy", subject(design, device, dtype)
    if not (isinstance(design.front, Tokens) and isinstance(design.head, Logits)):
        return 0.0
    prompts = [some_tokens(design, length, device, seed=length).tolist() for length in LENGTHS]
    worst = 0.0
    for batch in (prompts[:1], prompts):
        for prompt, new in zip(batch, generate_tokens(model, batch, max_tokens=NEW), strict=True):
            text = torch.tensor([prompt + new], device=device)
            logits = model(text)[0][0, len(prompt) - 1 : -1]
            # two may be equally likely, up to rounding; a wrong one is not
            chosen, likeliest = logits.gather(1, text[0, len(prompt) :, None])[:, 0], logits.amax(1)
            scale = logits.abs().amax(1)
            worst = max(worst, agree(law, f"{len(batch)} rows", {"": chosen / scale}, {"": likeliest / scale}))
    return worst
