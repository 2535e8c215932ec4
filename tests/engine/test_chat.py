"""A conversation by state is the conversation read from the start."""

from contextlib import closing

import pytest
import torch
from transformers import AutoTokenizer

import plait
from plait.data import ByteTokenizer, DataError
from plait.engine import Chat, Sampling, generate_tokens
from tests.engine.conftest import CHATML, FORGETTING

QUESTIONS = ["hello", "and then?", "why", "go on."]
CLOSE = 1e-9  # float64: calls differ in the order of sums alone


def build(tokenizer, pattern="DF AF", seed=1, **design):
    return plait.build(
        plait.ModelConfig(vocab=tokenizer.vocab, dim=64, pattern=pattern, **design), seed=seed, dtype=torch.float64
    )


def templated(chat, messages, answer):
    return chat.tokenizer.encode(chat.template.render(messages, answer=answer), special=True)


@pytest.mark.parametrize("pattern", ["DF AF", "[M|A]F"])
@pytest.mark.parametrize(("kind", "template"), [("letters", CHATML), ("bytes", CHATML), ("letters", FORGETTING)])
def test_turns_by_state_are_the_whole_conversation_read_from_the_start(chat_tokenizer, kind, template, pattern):
    tokenizer = chat_tokenizer(kind, template)
    model = build(tokenizer, pattern)
    chat = Chat(model, tokenizer, system="be brief", max_tokens=9)
    for question in QUESTIONS:
        before = [*chat.messages, {"role": "user", "content": question}]
        asked, had = templated(chat, before, answer=True), len(chat.tokens)
        answer = "".join(chat.say(question))
        tokens = generate_tokens(model, [asked], max_tokens=9)[0]
        ended = next((at for at, token in enumerate(tokens) if token in tokenizer.ends), len(tokens))
        assert answer == tokenizer.decode([*asked, *tokens[:ended]])[len(tokenizer.decode(asked)) :]
        assert chat.messages == [*before, {"role": "assistant", "content": answer}]
        assert chat.read - chat.again == len(asked) - had
        if kind == "letters" and template == CHATML:
            assert chat.again == 0
        following = torch.tensor([[tokenizer.ends[-1], 3]])
        by_state, _ = model(following, chat.state)
        whole, _ = model(torch.cat([torch.tensor([chat.tokens]), following], 1))
        torch.testing.assert_close(by_state, whole[:, -2:], rtol=0, atol=CLOSE)


def test_only_what_the_template_rewrites_is_read_again(chat_tokenizer):
    tokenizer = chat_tokenizer(template=FORGETTING)
    chat = Chat(build(tokenizer), tokenizer, max_tokens=9)
    again = []
    for question in QUESTIONS:
        before = len(chat.tokens)
        answer = "".join(chat.say(question))
        again.append(chat.again)
        assert chat.again <= 9 and chat.read <= len(chat.tokens) - before + 2 * 9 and answer
    assert again[0] == 0 and max(again) > 0


def test_the_template_and_where_it_ends_are_transformers(chat_tokenizer, tmp_path):
    tokenizer = chat_tokenizer()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "letters")
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes."},
        {"role": "user", "content": "so"},
    ]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode(tokenizer.chat_template.render(messages, answer=True), special=True) == ids
    names = [theirs.convert_ids_to_tokens(id) for id in tokenizer.ends]
    assert names == ["<|endoftext|>", "<|im_end|>"]
    (tmp_path / "letters" / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert chat_tokenizer().ends[1:3] == (3, 5)


def test_an_answer_that_is_stopped_is_what_was_said(chat_tokenizer):
    tokenizer = chat_tokenizer()
    model = build(tokenizer)
    chat, other = Chat(model, tokenizer, max_tokens=9), Chat(model, tokenizer, max_tokens=3)
    with closing(chat.say("hello")) as pieces:
        first = [next(pieces) for _ in range(3)]
    assert chat.messages[-1] == {"role": "assistant", "content": "".join(first)}
    assert "".join(other.say("hello")) == "".join(first)
    assert "".join(other.say("more")) == "".join(chat.say("more"))[:3] and chat.again == 0
    chat.reset()
    assert chat.messages == [] and "".join(chat.say("hello")).startswith("".join(first)) and chat.again == 0


def test_an_answer_can_be_stopped_where_its_tokens_show_nothing_yet(chat_tokenizer):
    tokenizer = chat_tokenizer()
    model = build(tokenizer)
    whole = "".join(Chat(model, tokenizer, max_tokens=9).say("hello"))
    chat = Chat(model, tokenizer, max_tokens=9, stop=f"{whole}.")
    with closing(chat.say("hello")) as pieces:
        assert [next(pieces) for _ in range(3)] == ["", "", ""]
    assert chat.messages[-1] == {"role": "assistant", "content": ""}
    chat.reset()
    assert "".join(chat.say("hello")) == whole


def test_a_turn_that_broke_off_half_way_leaves_the_conversation_right(chat_tokenizer, monkeypatch):
    tokenizer = chat_tokenizer()
    model = build(tokenizer)
    chat = Chat(model, tokenizer, max_tokens=9)
    step, calls = model.step, []

    def interrupted(*arguments, **named):
        calls.append(step(*arguments, **named))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return calls[-1]

    monkeypatch.setattr(model, "step", interrupted)
    pieces = []
    with pytest.raises(KeyboardInterrupt):
        pieces.extend(chat.say("hello"))
    said = chat.messages[-1]["content"]
    asked = templated(chat, [*chat.messages, {"role": "user", "content": "so"}], answer=True)
    answer = "".join(chat.say("so"))
    assert said and answer == tokenizer.decode(generate_tokens(model, [asked], max_tokens=9)[0])


def test_a_question_is_put_into_the_template(chat_tokenizer):
    tokenizer = chat_tokenizer()
    model = build(tokenizer)
    chat = Chat(model, tokenizer, max_tokens=9, sampling=Sampling(temperature=1.0, seed=4))
    options = {"max_tokens": 9, "temperature": 1.0, "seed": 4, "chat": True}
    assert plait.generate(model, tokenizer, "hello", **options) == "".join(chat.say("hello"))


def test_what_is_no_chat_is_refused_in_one_line(chat_tokenizer):
    plain = chat_tokenizer(template=None)
    model = build(plain)
    for call in (lambda: Chat(model, plain), lambda: plait.generate(model, plain, "hi", chat=True)):
        with pytest.raises(
            DataError, match="has no chat template: put a chat_template.jinja beside its tokenizer.json"
        ):
            call()
    with pytest.raises(DataError, match="has no chat template"):
        Chat(plait.build(plait.ModelConfig(vocab=257, dim=64, pattern="F")), ByteTokenizer())
    picky = chat_tokenizer(template="{{ raise_exception('no systems here') }}")
    with pytest.raises(DataError, match="refuses this conversation .no systems here."):
        Chat(model, picky).say("hi")
    short = build(plain, layers={"A": plait.Attention(heads=2, rope=plait.RoPE(max_positions=40))})
    chat = Chat(short, chat_tokenizer())
    assert len("".join(chat.say("hi"))) <= 40
    with pytest.raises(ValueError, match="the model's positions end at 40: begin anew"):
        chat.say("a long story")
    with pytest.raises(ValueError, match="max_tokens"):
        Chat(model, chat_tokenizer(), max_tokens=0)
