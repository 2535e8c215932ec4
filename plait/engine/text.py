"""Text in, text out: whole or as it comes."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import TypeVar

from plait.data.chat_template import need_template
from plait.data.tokenizer import TextStream, Tokenizer
from plait.engine.decode import check, check_vocab, continuations
from plait.engine.sampling import Sampling
from plait.model.language_model import LanguageModel

Prompt = TypeVar("Prompt", str, list[str])


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
    chat: bool = False,
) -> Prompt:
    """Continue a prompt, or a list of prompts of any lengths; gives the continuation(s) without the prompt(s).

    A continuation ends at `max_tokens` tokens, at the tokenizer's end of text, or before the first of the `stop`
    strings. The default is greedy: equal calls give equal texts. Above temperature 0 it samples; see `Sampling`.
    Prompt and continuation together are what the tokenizer decodes all tokens to. With `chat` a prompt is what a user says: the
    tokenizer's chat template is put around it, and the continuation is the answer, which ends where the model's turn does.
    Raises ValueError for an empty prompt, options out of range, or a tokenizer with more ids than the model.
    """
    if not isinstance(prompt, str | list | tuple):
        raise ValueError(f"prompt is of type {type(prompt).__name__}; expected a str or a list of them")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    texts: list[list[str]] = [[] for _ in prompts]
    for row, piece in _pieces(model, tokenizer, prompts, max_tokens, sampling, stop, chat):
        texts[row].append(piece)
    if isinstance(prompt, str):
        return "".join(texts[0])
    return ["".join(pieces) for pieces in texts]


def stream(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
    chat: bool = False,
) -> Iterator[str]:
    """What `generate` gives for one prompt, in pieces as soon as they are certain: never part of a character, never the
    beginning of what may become a stop string. Wrong arguments raise here, not at the first piece."""
    if not isinstance(prompt, str):
        raise ValueError(f"stream continues one prompt, a str; got {type(prompt).__name__}")
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    return _of_one(_pieces(model, tokenizer, [prompt], max_tokens, sampling, stop, chat))


def _of_one(pieces: Generator[tuple[int, str]]) -> Generator[str]:
    with closing(pieces):  # a generator that is closed lets go of those inside it only later, from Python 3.12 on
        for _, piece in pieces:
            yield piece


def _pieces(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: list[str],
    max_tokens: int,
    sampling: Sampling,
    stop: str | Sequence[str],
    chat: bool,
) -> Generator[tuple[int, str]]:
    """(row, text) as it comes. Checks everything before it returns."""
    check_vocab(model, tokenizer)
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {row} is of type {type(prompt).__name__}, expected str")
    ids = [asked(tokenizer, prompt) if chat else tokenizer.encode(prompt) for prompt in prompts]
    check(model, ids, max_tokens)
    ends = tokenizer.ends if chat else (tokenizer.eos,)
    return _texts(model, tokenizer, ids, max_tokens, sampling, stop_strings(stop), ends)


def asked(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a conversation that begins with `text`, up to where the model answers."""
    messages = [{"role": "user", "content": text}]
    return tokenizer.encode(need_template(tokenizer).render(messages, answer=True), special=True)


def _texts(
    model: LanguageModel,
    tokenizer: Tokenizer,
    ids: list[list[int]],
    max_tokens: int,
    sampling: Sampling,
    stops: tuple[str, ...],
    ends: tuple[int, ...],
) -> Generator[tuple[int, str]]:
    texts = [StoppedText(tokenizer.stream(after=prompt), stops) for prompt in ids]
    done: set[int] = set()
    tokens = continuations(
        model, ids, max_tokens=max_tokens, sampling=sampling, ends=ends, vocab=tokenizer.vocab, done=done
    )
    with closing(tokens):
        for row, token in tokens:
            piece = texts[row].push(token)
            if texts[row].ended:
                done.add(row)
            if piece:
                yield row, piece
    for row, text in enumerate(texts):
        piece = text.finish()
        if piece:
            yield row, piece


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """`stop` as strings. Raises ValueError for what is none."""
    if not isinstance(stop, str | Sequence):
        raise ValueError(f"stop is of type {type(stop).__name__}; expected a string or a list of strings")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop holds {text!r}; expected strings of at least one character")
    return stops


class StoppedText:
    """The text of a growing row of tokens, up to the stop string that is completed first. What may be the beginning of
    one is held back."""

    def __init__(self, text: TextStream, stops: tuple[str, ...]):
        self._text = text
        self._stops = stops
        self._held = ""
        self.ended = False

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        self._held += self._text.push(token)
        return self._release()

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        if self.ended:
            return ""
        self._held += self._text.finish()
        given = self._release()
        return given + self._held

    def _release(self) -> str:
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.ended = True
            given, self._held = self._held[: min(found)[1]], ""
            return given
        certain = len(self._held) - self._open()
        given, self._held = self._held[:certain], self._held[certain:]
        return given

    def _open(self) -> int:
        """How many of the last characters are the beginning of a stop string."""
        longest = min(len(self._held), max(map(len, self._stops), default=1) - 1)
        for count in range(longest, 0, -1):
            if any(stop.startswith(self._held[-count:]) for stop in self._stops):
                return count
        return 0
