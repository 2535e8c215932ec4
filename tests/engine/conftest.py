"""Tokenizers that know a chat."""

import string
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models

from plait.data import Tokenizer, load_tokenizer, train_bpe

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as templates of models that think do: what was thought is dropped from all answers but the last
FORGETTING = CHATML.replace(
    "{{ m.content }}", "{{ m.content if loop.last or m.role != 'assistant' else m.content[:1] }}"
)


def letters() -> tokenizers.Tokenizer:
    """A token a letter: whatever is generated is what its text is encoded to."""
    alphabet = string.ascii_letters + " \n.?!"
    inner = tokenizers.Tokenizer(models.BPE({letter: id for id, letter in enumerate(alphabet)}, []))
    inner.decoder = decoders.Fuse()
    return inner


def bytewise(folder: Path) -> tokenizers.Tokenizer:
    """Most of what a random model generates is no text that is encoded to the same tokens."""
    train_bpe(["hello world, how are you today? I am fine."] * 20, 300).save(folder)
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture
def chat_tokenizer(tmp_path) -> Callable[..., Tokenizer]:
    """A tokenizer of a kind with a template, from its files; None: without one."""

    def make(kind: str = "letters", template: str | None = CHATML) -> Tokenizer:
        folder = tmp_path / kind
        folder.mkdir(exist_ok=True)
        inner = letters() if kind == "letters" else bytewise(folder)
        inner.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        inner.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return load_tokenizer(folder)

    return make
