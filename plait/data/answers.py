"""Records of questions and answers, of which only the answers are learned: `messages`, or `prompt` and `completion`.

A conversation becomes the tokens of its chat template, and what counts is each answer with the token that ends it. Where a
template writes earlier turns anew (some drop what was thought), the record becomes a document for each time it does.
A prompt and its completion are read as they stand, and the end of text after them counts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from plait.data.chat_template import ROLES, Message, encoded, need_template
from plait.data.corpus import FIELD, FileSource, Source, open_source
from plait.data.errors import DataError, nearest
from plait.data.records import jsonl_records
from plait.data.text import whole_characters
from plait.data.tokenizer import Tokenizer

MESSAGES, PROMPT, COMPLETION = "messages", "prompt", "completion"
HOLDS = f"{MESSAGES!r}, or {PROMPT!r} and {COMPLETION!r}"
Form = Literal["messages", "prompt"]


@dataclass(slots=True)
class Answered:
    """A document: token ids, and for each whether it is to be learned."""

    ids: list[int]
    scored: list[bool]

    def extend(self, ids: Sequence[int], scored: bool) -> None:
        """`ids` are those of all so far and of more, which counts or not."""
        self.scored += [scored] * (len(ids) - len(self.ids))
        self.ids = list(ids)


def answers_in(source: str | Path | Source) -> Form | None:
    """How the first record of .jsonl files holds answers; None: it has a text, or the source is none of records.
    Raises DataError where it holds neither."""
    opened = source if not isinstance(source, str | Path) else open_source(source)
    if not isinstance(opened, FileSource) or opened.field not in (None, MESSAGES):
        return None
    for _, path in opened.files:
        if path.suffix.lower() not in (".jsonl", ".ndjson"):
            return None
        for number, record in jsonl_records(path, f"field {opened.field or FIELD!r}"):
            if opened.field == MESSAGES:
                return "messages"
            form = _form(record)
            if form is None and FIELD not in record:
                raise DataError(f"{path}, line {number}: {_no_form(record, f'{FIELD!r}, {HOLDS}', FIELD)}")
            return form if FIELD not in record else None
    return None


def _form(record: dict[str, Any]) -> Form | None:
    if MESSAGES in record:
        return "messages"
    return "prompt" if PROMPT in record and COMPLETION in record else None


def answered(source: FileSource, tokenizer: Tokenizer) -> Iterator[tuple[str, str, Answered]]:
    """(id, file and line, document) of every record. Raises DataError naming file and line."""
    for name, path in source.files:
        for number, record in jsonl_records(path, HOLDS):
            where = f"{path}, line {number}"
            id = str(number) if source.named else f"{name}:{number}"
            try:
                if source.field == MESSAGES and MESSAGES not in record:
                    raise DataError(_no_form(record, repr(MESSAGES)))
                documents = list(_documents(record, tokenizer))
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            for document in documents:
                yield id, where, document


def _documents(record: dict[str, Any], tokenizer: Tokenizer) -> Iterator[Answered]:
    form = _form(record)
    if form == "messages":
        return _conversation(check_messages(record[MESSAGES]), record.get("tools"), tokenizer)
    if form == "prompt":
        return iter([_pair(_string(record, PROMPT), _string(record, COMPLETION), tokenizer)])
    raise DataError(_no_form(record, HOLDS))


def _no_form(record: dict[str, Any], expected: str, *more: str) -> str:
    """What is wrong with a record that has no answers in it, nor any of `more`."""
    known = (MESSAGES, PROMPT, COMPLETION, *more)
    missing = [name for name in known if name not in record]
    near = next((hint for key in record if key not in known and (hint := nearest(key, missing))), "")
    shown = ", ".join(repr(key) for key in list(record)[:12]) or "none"
    return f"expected {expected}, its fields are {shown}{near}"


def _string(record: dict[str, Any], field: str) -> str:
    if not isinstance(record[field], str):
        raise DataError(f"field {field!r} is {type(record[field]).__name__}; expected a string")
    return whole_characters(record[field])


def _pair(prompt: str, completion: str, tokenizer: Tokenizer) -> Answered:
    if not completion.strip():
        raise DataError(f"{COMPLETION!r} is empty: there is no answer to learn")
    asked = tokenizer.encode(prompt)
    whole = tokenizer.encode(prompt + completion)
    if (
        whole[: len(asked)] != asked
    ):  # a token lies across the border, which generating after the prompt would never give
        whole = [*asked, *tokenizer.encode(completion)]
    document = Answered(asked, [False] * len(asked))
    document.extend([*whole, tokenizer.eos], scored=True)
    return document


def check_messages(messages: Any) -> list[Message]:
    """`messages` as a chat template takes them. Raises DataError for what is no conversation with an answer in it."""
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{MESSAGES!r} is {'empty' if messages == [] else type(messages).__name__}; expected a list of messages"
        )
    checked = [_message(place, message) for place, message in enumerate(messages)]
    answers = (message for message in checked if message["role"] == "assistant")
    if not any(answer["content"].strip() or answer.get("tool_calls") for answer in answers):
        raise DataError("no message of the role 'assistant' says anything: there is no answer to learn")
    return checked


def _message(place: int, message: Any) -> Message:
    where = f"message {place}"
    if not isinstance(message, dict):
        raise DataError(f"{where} is {type(message).__name__}; expected an object with 'role' and 'content'")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{where}: unknown role {role!r}; expected {', '.join(ROLES)}{nearest(str(role), ROLES)}")
    if content is None and "tool_calls" in message:
        content = ""
    if not isinstance(content, str):
        raise DataError(f"{where}: content is {type(content).__name__}; expected a string")
    return message | {"content": whole_characters(content)}


def _conversation(messages: list[Message], tools: Any, tokenizer: Tokenizer) -> Iterator[Answered]:
    template = need_template(tokenizer)
    text, document = "", Answered([], [])
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.render(messages[:place], answer=True, tools=tools)
        after = template.render(messages[: place + 1], answer=False, tools=tools)
        if not after.startswith(before):
            raise DataError(f"message {place}: the chat template writes an answer otherwise than it begins one")
        if not before.startswith(text):
            yield _ended(document, tokenizer)
            text, document = "", Answered([], [])
        document.extend(encoded(tokenizer, text, document.ids, before[len(text) :]), scored=False)
        answer = after[len(before) :].rstrip()  # templates end a line after the token that ends the turn
        document.extend(encoded(tokenizer, before, document.ids, answer), scored=True)
        text = before + answer
    yield _ended(document, tokenizer)


def _ended(document: Answered, tokenizer: Tokenizer) -> Answered:
    """With an end to learn, where the template wrote none."""
    if document.ids and tokenizer.decode(document.ids[-1:]):
        document.extend([*document.ids, tokenizer.eos], scored=True)
    return document
