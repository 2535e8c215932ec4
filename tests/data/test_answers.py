"""Records with answers: what is learned of them, and what is refused."""

import itertools
import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from plait.data import DataError, Loader, answers_in, load_tokenizer, open_source, prepare_answers
from plait.data.answers import answered
from tests.engine.conftest import CHATML, FORGETTING

# transformers' own way to say which tokens are the assistant's
MARKED = CHATML.replace(
    "{{ m.content }}<|im_end|>",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}",
)
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi there."},
    {"role": "user", "content": "and you?"},
    {"role": "assistant", "content": "fine, thanks"},
    {"role": "user", "content": "bye"},
]
PAIR = {"prompt": "the sea is", "completion": " blue"}


@pytest.fixture
def tokenizer(bpe, tmp_path):
    """A BPE with a chat template."""
    folder = tmp_path / "tokenizer"
    bpe.save(folder)

    def make(template=CHATML):
        inner = json.loads((folder / "tokenizer.json").read_text())
        tokens = [token["content"] for token in inner["added_tokens"]]
        for name in {"<|im_start|>", "<|im_end|>"} - set(tokens):
            added = {"id": len(inner["model"]["vocab"]) + name.count("e"), "content": name, "special": True}
            flags = {"normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
            inner["added_tokens"].append(added | flags)
        inner["added_tokens"].sort(key=lambda token: token["id"])
        (folder / "tokenizer.json").write_text(json.dumps(inner))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return load_tokenizer(folder)

    return make


@pytest.fixture
def records(write):
    return lambda *lines: write("talks.jsonl", "\n".join(map(json.dumps, lines)))


def documents(path, tokenizer):
    return [document for _, _, document in answered(open_source(path), tokenizer)]


def test_what_is_learned_of_a_conversation_is_what_transformers_marks(tokenizer, records, tmp_path):
    ours = tokenizer(MARKED)
    (document,) = documents(records({"messages": TALK}), ours)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    said = theirs.apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=True)
    until = len(document.ids)  # after the last answer there is nothing to learn
    assert document.ids == said["input_ids"][:until]
    assert document.scored == [bool(mark) for mark in said["assistant_masks"][:until]]
    assert not any(said["assistant_masks"][until:]) and document.scored[-1]


def test_where_a_template_rewrites_a_turn_each_answer_is_read_as_it_is_asked_for(tokenizer, records):
    ours = tokenizer(FORGETTING)
    found = documents(records({"messages": TALK}), ours)
    assert len(found) == 2
    for document, upto in zip(found, (3, 5), strict=True):
        before = ours.encode(ours.chat_template.render(TALK[: upto - 1], answer=True), special=True)
        learned = ours.encode(TALK[upto - 1]["content"]) + [ours.ends[-1]]
        assert document.ids == before + learned
        assert document.scored == [False] * len(before) + [True] * len(learned)


def test_a_completion_and_the_end_of_text_are_learned(tokenizer, records):
    ours = tokenizer(None)
    (document,) = documents(records(PAIR), ours)
    asked, answer = ours.encode(PAIR["prompt"]), ours.encode(PAIR["completion"])
    assert document.ids == [*asked, *answer, ours.eos]
    assert document.scored == [False] * len(asked) + [True] * (len(answer) + 1)
    (across,) = documents(records({"prompt": "the sea ", "completion": "is"}), ours)
    assert across.ids[: sum(not scored for scored in across.scored)] == ours.encode("the sea ")


def test_a_template_without_an_end_of_turn_learns_the_end_of_text(tokenizer, records):
    ours = tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (document,) = documents(records({"messages": TALK}), ours)
    assert document.ids[-1] == ours.eos and document.scored[-1]
    assert ours.ends == (ours.eos,)


def test_a_call_of_a_tool_is_an_answer(tokenizer, records):
    ours = tokenizer(
        CHATML.replace("{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %}call {{ c.name }}{% endfor %}")
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    (document,) = documents(records({"messages": [TALK[1], call]}), ours)
    learned = [id for id, scored in zip(document.ids, document.scored, strict=True) if scored]
    assert ours.decode(learned) == "call f"


def test_batches_are_whole_records_of_which_answers_are_targets(tokenizer, records, tmp_path):
    ours, length = tokenizer(), 60
    talks = [{"messages": [*TALK[:2], {"role": "assistant", "content": f"{n} " + "yes " * n}]} for n in range(1, 30)]
    path = records(*talks, PAIR)
    whole = {tuple(d.ids[: length + 1]): d.scored[: length + 1] for d in documents(path, ours)}
    shards = prepare_answers(path, ours, tmp_path / "cache", length=length, heldout=0.2)
    assert shards.meta.cut == sum(len(d.ids) > length + 1 for d in documents(path, ours)) > 0
    assert prepare_answers(path, ours, tmp_path / "cache", length=length, heldout=0.2).folder == shards.folder
    loaders = [Loader(shards, batch=4, length=length, epochs=1, rank=rank, ranks=2) for rank in (0, 1)]
    one, seen = Loader(shards, batch=4, length=length, epochs=1), []
    for batch, *halves in zip(one, *loaders, strict=True):
        assert np.array_equal(batch.inputs[0], np.concatenate([half.inputs[0] for half in halves]))
        assert np.array_equal(batch.targets[0], np.concatenate([half.targets[0] for half in halves]))
        assert batch.inputs.shape[1] <= 4 * length
        for start, end in itertools.pairwise(batch.cu_seqlens.tolist()):
            inputs, targets = batch.inputs[0, start:end].tolist(), batch.targets[0, start:end].tolist()
            key = next(ids for ids in whole if list(ids[:length]) == inputs)
            following = [*zip(key[1:], whole[key][1:], strict=True), (0, False)][: len(inputs)]
            assert targets == [id if scored else -100 for id, scored in following]
            seen.append(key)
    assert len(seen) == len(set(seen)) == shards.meta.documents - shards.meta.heldout_documents
    again, fresh = Loader(shards, batch=4, length=length), Loader(shards, batch=4, length=length)
    next(again)
    fresh.load_state_dict(json.loads(json.dumps(again.state_dict())))
    assert np.array_equal(next(again).inputs, next(fresh).inputs)


def test_a_file_says_by_its_first_record_whether_it_holds_answers(records, write):
    assert answers_in(records({"messages": TALK})) == "messages"
    assert answers_in(records(PAIR)) == "prompt"
    assert answers_in(records({"text": "a", "messages": TALK})) is None
    assert answers_in(f"{records({'text': 'a', 'messages': TALK})}:messages") == "messages"
    assert answers_in(f"{records(PAIR)}:prompt") is None
    assert answers_in(f"{records(PAIR)}:messages") == "messages"
    assert answers_in(write("a.txt", "text")) is None
    expected = "line 1: expected 'text', 'messages', or 'prompt' and 'completion', its fields are"
    with pytest.raises(DataError, match=f"{expected} 'prompt', 'response'$"):
        answers_in(records({"prompt": "a", "response": "b"}))
    with pytest.raises(DataError, match=f"{expected} 'txt'; did you mean 'text'"):
        answers_in(records({"txt": "a"}))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"prompt": "a", "completon": "b"},
            "line 2: expected 'messages', or 'prompt' and 'completion'.*did you mean 'completion'",
        ),
        ({"prompt": "a"}, "line 2: expected 'messages', or 'prompt' and 'completion', its fields are 'prompt'$"),
        ({"prompt": "a", "completion": " "}, "line 2: 'completion' is empty: there is no answer"),
        ({"prompt": 3, "completion": "b"}, "line 2: field 'prompt' is int; expected a string"),
        ({"messages": []}, "line 2: 'messages' is empty"),
        ({"messages": "hi"}, "line 2: 'messages' is str; expected a list"),
        ({"messages": ["hi"]}, "line 2: message 0 is str; expected an object with 'role' and 'content'"),
        ({"messages": TALK[:2]}, "line 2: no message of the role 'assistant' says anything"),
        (
            {"messages": [{"role": "asistant", "content": "a"}]},
            "line 2: message 0: unknown role 'asistant'.*'assistant'",
        ),
        ({"messages": [{"role": "user", "content": [1]}]}, "line 2: message 0: content is list; expected a string"),
        (
            {"prompt": "a b " * 80, "completion": "b"},
            "line 2: its answer begins after .* tokens, beyond the 60 of data.length",
        ),
    ],
)
def test_what_holds_no_answer_is_refused_with_file_and_line(record, message, tokenizer, records, tmp_path):
    path = records({"messages": TALK}, record)
    with pytest.raises(DataError, match=f"^{path}, {message}") as caught:
        prepare_answers(path, tokenizer(), tmp_path / "cache", length=60)
    assert "\n" not in str(caught.value)


def test_messages_that_are_insisted_on_are_in_every_record(tokenizer, records, tmp_path):
    path = records({"messages": TALK}, PAIR)
    with pytest.raises(
        DataError, match=f"^{path}, line 2: expected 'messages', its fields are 'prompt', 'completion'$"
    ):
        prepare_answers(f"{path}:messages", tokenizer(), tmp_path / "cache", length=60)


def test_messages_need_a_template(tokenizer, records, tmp_path):
    with pytest.raises(DataError, match=r"line 1: the tokenizer .* has no chat template: put a chat_template.jinja"):
        prepare_answers(records({"messages": TALK}), tokenizer(None), tmp_path / "cache", length=60)
    with pytest.raises(DataError, match="1 records; expected at least 2"):
        prepare_answers(records(PAIR), tokenizer(None), tmp_path / "cache", length=60)
