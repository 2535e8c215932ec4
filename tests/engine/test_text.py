"""Text in, text out: a continuation is what all tokens together add to the prompt."""

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

import plait
from plait.data import ByteTokenizer, load_tokenizer, train_bpe
from plait.engine import Sampling, generate_tokens, stream

PROMPTS = ["the sea", "a", "the the a sea "]


def metaspace(folder):
    """Spaces belong to the words that follow them, and the first one of a text is not shown."""
    words = ["<unk>", "</s>", "▁", "a", "s", "e", "▁the", "▁sea", "▁a", "t", "h"]
    inner = tokenizers.Tokenizer(models.Unigram([(word, -float(len(words) - len(word))) for word in words], 0))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "metaspace"])
def test_prompt_and_continuation_are_the_text_of_all_tokens(tmp_path, kind):
    tokenizer = {"bytes": ByteTokenizer, "bpe": lambda: train_bpe(PROMPTS * 9, 270)}.get(
        kind, lambda: metaspace(tmp_path)
    )()
    design = plait.ModelConfig(vocab=tokenizer.vocab, dim=64, pattern="DF")
    model = plait.build(design, seed=3, dtype=torch.float64)
    options = {"max_tokens": 12, "temperature": 1.0, "seed": 5}
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    sampling = Sampling(temperature=1.0, seed=5)
    added = generate_tokens(model, ids, max_tokens=12, sampling=sampling, eos=tokenizer.eos)
    whole = [tokenizer.decode([*row, *more]) for row, more in zip(ids, added, strict=True)]
    before = [tokenizer.decode(row) for row in ids]
    texts = plait.generate(model, tokenizer, PROMPTS, **options)
    assert [first + text for first, text in zip(before, texts, strict=True)] == whole
    if kind == "metaspace":
        assert any(text.startswith(" ") for text in texts)
    assert "".join(stream(model, tokenizer, PROMPTS[0], **options)) == plait.generate(
        model, tokenizer, PROMPTS[0], **options
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": None}, "NoneType"),
        ({"prompt": b"a"}, "bytes"),
        ({"prompt": 3}, "int"),
        ({"prompt": "a\ud800"}, "character 1 .U.D800. is half of a surrogate pair"),
        ({"prompt": "caf\udce9"}, "character 3 is the byte 0xe9, not UTF-8"),
        ({"stop": None}, "stop is of type NoneType; expected a string or a list"),
        ({"stop": 3}, "stop is of type int; expected a string or a list"),
        ({"stop": b"a"}, "stop holds 97; expected strings"),
    ],
)
def test_what_is_no_text_is_refused_in_one_line(options, message):
    model = plait.build(plait.ModelConfig(vocab=257, dim=64, pattern="AF"))
    for continued in (plait.generate, stream):
        with pytest.raises(ValueError, match=message) as caught:
            continued(model, ByteTokenizer(), **({"prompt": "a"} | options))
        assert "\n" not in str(caught.value)


def test_a_folder_is_no_model_and_a_name_no_tokenizer():
    model = plait.build(plait.ModelConfig(vocab=257, dim=64, pattern="AF"))
    for continued in (plait.generate, stream):
        with pytest.raises(TypeError, match=r"expected a model that plait\.build or plait\.load gave, got str"):
            continued("runs/small", ByteTokenizer(), "a")
        with pytest.raises(TypeError, match=r"expected a tokenizer that plait\.load_tokenizer gave, got str"):
            continued(model, "bytes", "a")
