"""A tokenizer's own chat template: messages to text, rendered as transformers does it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plait.data.errors import DataError, first_line

if TYPE_CHECKING:
    from plait.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
TEMPLATE = "chat_template.jinja"
Message = dict[str, Any]  # role, content, and what a template may read besides


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """text: Jinja. special: the tokens that it may name, as in {"bos_token": "<s>"}."""

    text: str
    special: Mapping[str, str]

    def render(
        self, messages: Sequence[Message], *, answer: bool, tools: Sequence[dict[str, Any]] | None = None
    ) -> str:
        """The conversation as text, special tokens spelled out. answer: and what stands before the model's next answer.
        Raises DataError where the template refuses these messages."""
        from transformers.utils.chat_template_utils import render_jinja_template

        names = {**self.special, "add_generation_prompt": answer}
        try:
            texts, _ = render_jinja_template(
                [list(messages)], tools=None if tools is None else list(tools), chat_template=self.text, **names
            )
        except Exception as error:  # templates raise what they like
            raise DataError(f"the chat template refuses this conversation ({first_line(error)})") from None
        return texts[0]


def need_template(tokenizer: "Tokenizer") -> ChatTemplate:
    """The tokenizer's template. Raises DataError for one that has none."""
    if tokenizer.chat_template is None:
        raise DataError(
            f"the tokenizer ({tokenizer.name}) has no chat template: put a {TEMPLATE} beside its tokenizer.json, as the "
            "instruction-tuned model of its family has one"
        )
    return tokenizer.chat_template


def encoded(tokenizer: "Tokenizer", text: str, ids: Sequence[int], more: str) -> list[int]:
    """Ids of `text + more`, of which `ids` are those of `text` and stay: the tokens of the whole where these begin so, else
    `more` on its own."""
    whole = tokenizer.encode(text + more, special=True)
    return whole if whole[: len(ids)] == list(ids) else [*ids, *tokenizer.encode(more, special=True)]


def turn_end(tokenizer: "Tokenizer") -> int | None:
    """The special token that the template writes after an answer; None where it writes none."""
    if tokenizer.chat_template is None:
        return None
    asked, word = [{"role": "user", "content": "hi"}], "hello"
    try:
        before = tokenizer.chat_template.render(asked, answer=True)
        after = tokenizer.chat_template.render([*asked, {"role": "assistant", "content": word}], answer=False)
    except DataError:  # it needs more of a conversation than this
        return None
    rest = after.removeprefix(before).partition(word)[2]
    return next((id for id in tokenizer.encode(rest, special=True) if tokenizer.decode([id]) == ""), None)
