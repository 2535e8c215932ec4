"""`plait chat`, `generate --chat` and `train ... lora=`: from a folder to a tuned one that talks."""

import io
import json
import signal

import pytest

import plait as library
from plait.data import load_tokenizer
from plait.engine.chat import Chat
from tests.engine.conftest import CHATML, letters


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a model that has learned nothing, and a tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "base"
    folder.mkdir()
    inner = letters()
    inner.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    inner.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHATML)
    tokenizer = load_tokenizer(folder)
    library.save(
        library.build(library.ModelConfig(vocab=tokenizer.vocab, dim=64, pattern="DF AF"), seed=1), folder, tokenizer
    )
    return folder


@pytest.fixture
def talk(plait, base, monkeypatch):
    def call(lines: str, *arguments: str):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        return plait("chat", str(base), "--max-tokens", "5", *arguments)

    return call


def test_each_line_of_a_pipe_is_a_turn(plait, talk, base, tmp_path):
    saved = tmp_path / "talk.json"
    ran = talk(f"hello\n\nand then\n/save {saved}\n/reset\nhello\n", "--json", "--system", "be brief")
    assert ran.code == 0
    first, second = [m["content"] for m in json.loads(saved.read_text())["messages"] if m["role"] == "assistant"]
    assert ran.err.splitlines()[:4] == [first, second, f"wrote {saved}", first]
    assert ran.json["messages"][0] == {"role": "system", "content": "be brief"}
    assert [turn["again"] for turn in ran.json["turns"]] == [0, 0, 0]
    length = len("<|im_start|>user\nand then<|im_end|>\n") + 50
    assert ran.json["turns"][1]["read"] < length < 2 * length
    alone = plait("generate", str(base), "hello", "--chat", "--max-tokens", "5")
    assert talk("hello\n").out == alone.out and f"next: plait chat {base}" in alone.err


def test_what_goes_wrong_in_a_turn_is_a_line_and_the_next_goes_well(talk, tmp_path):
    ran = talk(f"/sav x\n/save\n/save {tmp_path}\n/help\nhello\n")
    errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert ran.code == 1 and len(errors) == 3
    assert errors[0] == "error: /sav: no such command; did you mean '/save'?"
    assert "/save: expected a file's name" in errors[1] and errors[2] == f"error: {tmp_path}: Is a directory"
    assert "/reset" in ran.out and ran.out.splitlines()[-1]


def test_ctrl_c_stops_the_answer_and_not_the_conversation(talk, monkeypatch):
    from plait.engine import Chat

    say = Chat.say

    def interrupted(self, text):
        for number, piece in enumerate(say(self, text)):
            if text == "hello" and number == 1:
                signal.raise_signal(signal.SIGINT)
            yield piece

    monkeypatch.setattr(Chat, "say", interrupted)
    before = signal.getsignal(signal.SIGINT)
    ran = talk("hello\nmore\n", "--json")
    assert ran.code == 0 and [turn["stopped"] for turn in ran.json["turns"]] == [True, False]
    assert len(ran.json["messages"][1]["content"]) == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_model_without_a_template_says_what_to_do(plait, run_folder):
    for arguments in (("chat", str(run_folder)), ("generate", str(run_folder), "hi", "--chat")):
        ran = plait(*arguments)
        assert ran.code == 1 and "has no chat template: put a chat_template.jinja beside" in ran.err


def test_fine_tuning_from_the_command_line(plait, talk, base, tmp_path, monkeypatch):
    """As a shell cuts it: the space inside the braces parts two words."""
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes."}]
    source = tmp_path / "talks.jsonl"
    source.write_text("\n".join([json.dumps({"messages": turns})] * 6))
    run = tmp_path / "run.yaml"
    run.write_text(f"data: {{source: {source}, length: 64, cache: {tmp_path}/cache}}\nsteps: 2\nbatch: 2\nwarmup: 0\n")
    monkeypatch.chdir(tmp_path)
    more = ["sample_every=1", "sample_prompt=hello", "folder=tuned", "device=cpu"]
    ran = plait("train", "run.yaml", f"start={base}", "lora={rank:", "3}", *more)
    assert ran.code == 0, ran.err
    assert "next: plait chat tuned" in ran.err and "sample: hello -> " in ran.out
    assert "5 to train on and 1 held out" in ran.out and "of which" in ran.out and "are trained" in ran.out
    assert plait("eval", "tuned", "ppl", "--json").json["loss"] > 0
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert plait("chat", "tuned", "--max-tokens", "3").code == 0
    with source.open("a") as file:
        file.write('\n{"messages": [{"role": "usr", "content": "a"}]}')
    ran = plait("train", "run.yaml", f"start={base}", "folder=other")
    assert ran.code == 1 and f"error: {source}, line 7: message 0: unknown role 'usr'" in ran.err
    ran = plait("train", "run.yaml", f"start={base}", "lora.rang=3")
    assert ran.code == 1 and "unknown key 'rang'; did you mean 'rank'" in ran.err


def test_a_conversation_does_not_outlive_sigterm(talk, monkeypatch):
    def answer(self, text):
        signal.raise_signal(signal.SIGTERM)
        yield ""

    monkeypatch.setattr(Chat, "say", answer)
    ran = talk("one\ntwo\n")
    assert ran.code == 143 and ran.err.splitlines()[-1] == "error: terminated"
