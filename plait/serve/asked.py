"""What OpenAI's clients ask for, as far as it can be done; what cannot is refused by name rather than left out.

The forms are those of its API reference (POST /v1/completions and /v1/chat/completions), with vLLM's names for what that lacks:
top_k, min_p, repetition_penalty.
"""

from typing import Any, ClassVar

from plait.data import Tokenizer
from plait.data.chat_template import Message, need_template
from plait.design.struct import Struct
from plait.engine.sampling import Sampling
from plait.engine.text import stop_strings

IGNORED = (  # what changes no answer
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"),
)
NEUTRAL: dict[str, tuple[Any, ...]] = {  # what cannot be done, and the values that ask for nothing
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "logprobs": (False,),  # 0 asks for some
    "top_logprobs": (0,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
INSTEAD = {"frequency_penalty": "repetition_penalty", "presence_penalty": "repetition_penalty"}


class StreamOptions(Struct, frozen=True, kw_only=True, tag=False):
    include_usage: bool = False


class Asked(Struct, frozen=True, kw_only=True, tag=False):
    """What both forms have. `temperature` is 1 where nothing is said, as there."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: str | list[str] | None = None
    seed: int | None = None
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.n <= 128:
            raise ValueError(f"n must be from 1 to 128, got {self.n}")
        self.stops()
        self.sampling()

    def sampling(self) -> Sampling:
        """At temperature 0 nothing is drawn, so that what narrows a draw is left out."""
        temperature = 1.0 if self.temperature is None else self.temperature
        narrowed = {} if temperature == 0 else {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        if narrowed.get("top_k") in (0, -1):  # vLLM's words for none
            del narrowed["top_k"]
        return Sampling(temperature=temperature, repetition_penalty=self.repetition_penalty, **narrowed)

    def stops(self) -> tuple[str, ...]:
        return stop_strings(self.stop or ())

    @property
    def usage_wanted(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class Completion(Asked, frozen=True, kw_only=True, tag=False):
    whole_name: ClassVar[str] = "text_completion"
    event_name: ClassVar[str] = "text_completion"
    prefix: ClassVar[str] = "cmpl"
    prompt: str | list[Any]
    max_tokens: int | None = 16

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """A text, ids, or a list of either."""
        if not self.prompt:
            raise ValueError("prompt is empty: expected a text, token ids, or a list of either")
        one = isinstance(self.prompt, str) or all(isinstance(x, int) for x in self.prompt)
        prompts = [self.prompt] if one else list(self.prompt)
        for place, prompt in enumerate(prompts):
            if not isinstance(prompt, str | list):
                raise ValueError(f"prompt[{place}] is {prompt!r}: expected a text, token ids, or a list of either")
        return [tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]

    def most(self, default: int) -> int:
        return default if self.max_tokens is None else self.max_tokens

    def ends(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        return (tokenizer.eos,)

    @staticmethod
    def whole(text: str) -> dict[str, Any]:
        """A choice's text in an answer."""
        return {"text": text}

    @staticmethod
    def piece(text: str, first: bool) -> dict[str, Any]:
        """A choice's text in an event."""
        return {"text": text}


class ChatCompletion(Asked, frozen=True, kw_only=True, tag=False):
    whole_name: ClassVar[str] = "chat.completion"
    event_name: ClassVar[str] = "chat.completion.chunk"
    prefix: ClassVar[str] = "chatcmpl"
    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        if not self.messages:
            raise ValueError("messages is empty: expected at least one, as in [{'role': 'user', 'content': ...}]")
        messages = [_message(message, f"messages[{place}]") for place, message in enumerate(self.messages)]
        return [tokenizer.encode(need_template(tokenizer).render(messages, answer=True), special=True)]

    def most(self, default: int) -> int:
        named = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return default if named is None else named

    def ends(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        return tuple(tokenizer.ends)

    @staticmethod
    def whole(text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    @staticmethod
    def piece(text: str, first: bool) -> dict[str, Any]:
        return {"delta": ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})}


Form = Completion | ChatCompletion


def _message(message: dict[str, Any], where: str) -> Message:
    """With the parts of its content joined, as templates read text."""
    if not isinstance(message.get("role"), str):
        raise ValueError(f"{where}: no role; expected one, as in {{'role': 'user', 'content': ...}}")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError(
                    f"{where}: this model reads text, so that parts must be {{'type': 'text', 'text': ...}}"
                )
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{where}: expected a text as its content, got {content!r}")
    return message | {"content": content}


def read(data: Any, kind: type[Form]) -> Form:
    """Raises ValueError that names the field: for what is unknown, of another type, or cannot be done."""
    if not isinstance(data, dict):
        raise ValueError("expected a JSON object")
    given = {name: value for name, value in data.items() if name not in IGNORED and value is not None}
    for name in NEUTRAL.keys() & given.keys():
        value = given.pop(name)
        if not any(value == none and isinstance(value, bool) is isinstance(none, bool) for none in NEUTRAL[name]):
            instead = f"; {INSTEAD[name]} can" if name in INSTEAD else ""
            raise ValueError(f"{name} cannot be done here{instead}")
    return kind(**given)
