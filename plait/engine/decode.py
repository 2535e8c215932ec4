"""The token loop: all rows advance together, and each leaves when it is done."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from plait.engine.prefill import advance, prefill
from plait.engine.sampling import Sampler, Sampling, check_finite
from plait.model.language_model import LanguageModel
from plait.ops.numbers import whole_number

ROOM = 4096  # keys a row is given room for at the start; more tokens grow the buffer


class Decoding:
    """Prompts being continued. `step` gives every live row its next token, `leave` ends rows.

    `vocab` limits the choice to the first ids, where the model has more than the tokenizer.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        vocab: int | None = None,
    ):
        max_tokens = check(model, prompts, max_tokens)
        prompts = [list(map(int, prompt)) for prompt in prompts]
        self.model = model
        self.vocab = vocab or model.design.vocab
        self.rows = list(range(len(prompts)))
        self.sampler = Sampler(sampling, prompts, self.vocab, model.device)
        with torch.inference_mode():
            self._hidden, self.state = prefill(model, prompts, min(max_tokens, ROOM))
            check_finite(self._hidden)
        self._tokens: torch.Tensor | None = None

    @torch.inference_mode()
    def step(self) -> list[int]:
        """The next token of each live row, in the order of `rows`."""
        if self._tokens is not None:
            hidden, self.state = advance(self.model, self._tokens[:, None], self.state)
            self._hidden = hidden[:, -1]
        logits = self.model.head(self._hidden)
        self._tokens = self.sampler.choose(logits if self.vocab == logits.shape[-1] else logits[:, : self.vocab])
        return self._tokens.tolist()

    @torch.inference_mode()
    def leave(self, done: Collection[int]) -> None:
        """Take rows, named by their prompts' places, out of the batch; memory shrinks with them."""
        if not done:
            return
        keep = [place for place, row in enumerate(self.rows) if row not in done]
        if len(keep) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in keep]
        if keep:
            self.sampler.keep(keep)
            self.state = self.state.select(keep)
            if self._tokens is not None:
                self._tokens = self._tokens[torch.tensor(keep, device=self._tokens.device)]


def generate_tokens(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 256,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    eos: int | None = None,
) -> list[list[int]]:
    """Continue prompts of token ids, of any lengths, by up to `max_tokens` ids; `eos` ends a row and is left out."""
    output: list[list[int]] = [[] for _ in prompts]
    for row, token in continuations(model, prompts, max_tokens=max_tokens, sampling=sampling, eos=eos):
        output[row].append(token)
    return output


def continuations(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling,
    eos: int | None = None,
    vocab: int | None = None,
    done: set[int] | None = None,
) -> Iterator[tuple[int, int]]:
    """(row, token) as they come. Rows that the caller adds to `done` meanwhile are taken out before the next step."""
    if not len(prompts):
        return
    done = set() if done is None else done
    with evaluating(model):
        decoding = Decoding(model, prompts, max_tokens=max_tokens, sampling=sampling, vocab=vocab)
        for _ in range(int(max_tokens)):
            for row, token in zip(decoding.rows, decoding.step(), strict=True):
                if token == eos:
                    done.add(row)
                else:
                    yield row, token
            decoding.leave(done)
            if not decoding.rows:
                return


def check(model: LanguageModel, prompts: Sequence[Sequence[int]], max_tokens: int) -> int:
    """`max_tokens` as an int. Raises ValueError for what cannot be continued."""
    max_tokens = whole_number("max_tokens", max_tokens, 1)
    for row, prompt in enumerate(prompts):
        name = "the prompt" if len(prompts) == 1 else f"prompt {row}"
        if not isinstance(prompt, Iterable) or isinstance(prompt, str):
            raise ValueError(f"{name} must be a sequence of token ids, as in [[1, 2]]; got {prompt!r}")
        if not len(prompt):
            raise ValueError(f"{name} is empty: expected at least one token to continue from")
        for (
            token
        ) in prompt:  # here and not on the model's device, where an id too large would end the process's use of it
            if whole_number(f"{name}: a token id", token, 0) >= model.design.vocab:
                raise ValueError(f"{name}: token id {token} is outside the model's vocabulary of {model.design.vocab}")
        last = len(prompt) + max_tokens - 1  # the last new token is not read
        if model.max_positions is not None and last > model.max_positions:
            left = model.max_positions - len(prompt) + 1
            hint = f"give max_tokens={left} or fewer" if left > 0 else "shorten it"
            raise ValueError(
                f"{name} of {len(prompt)} tokens with max_tokens={max_tokens} is longer than RoPE was configured for "
                f"(max_positions {model.max_positions}); {hint}"
            )
    return max_tokens


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """The model in evaluation mode inside the block, and as it was after it."""
    was = model.training
    if was:
        model.eval()
    try:
        yield
    finally:
        if was:
            model.train()
