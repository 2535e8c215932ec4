"""What comes over HTTP is what `plait.generate` gives, whole or in events; what cannot be done is refused by name."""

import http.client
import json
import threading
import time
from contextlib import closing, contextmanager

import pytest
import uvicorn

import plait
from plait.data import load_tokenizer
from plait.serve import Batch, Service
from tests.engine.conftest import CHATML, letters

MODEL, WAIT = "tiny", 60.0
HELLO = [{"role": "user", "content": "hello"}]


@contextmanager
def listening(model, tokenizer, **how):
    """(port, batch) of a server in a thread."""
    batch = Batch(model, vocab=tokenizer.vocab, **how)
    server = uvicorn.Server(uvicorn.Config(Service(batch, tokenizer, MODEL).app(), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1], batch
    finally:
        server.should_exit = True
        thread.join(WAIT)


def until(true) -> None:
    limit = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    inner = letters()
    inner.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    inner.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHATML)
    tokenizer = load_tokenizer(folder)
    return plait.build(plait.ModelConfig(vocab=tokenizer.vocab, dim=64, pattern="DF AF"), seed=1), tokenizer


@pytest.fixture(scope="module")
def served(parts):
    with listening(*parts, rows=3, length=200) as (port, _):
        yield port


def ask(port, path, data=None):
    body = data if data is None or isinstance(data, bytes) else json.dumps(data)
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)) as connection:
        connection.request("GET" if data is None else "POST", path, body)
        with connection.getresponse() as answer:
            return answer.status, answer.read().decode()


def whole(port, path, **data):
    status, text = ask(port, path, data)
    assert status == 200, text
    return json.loads(text)


def events(port, path, **data):
    status, text = ask(port, path, data | {"stream": True})
    assert status == 200 and text.endswith("data: [DONE]\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 7}, {"seed": 7, "top_p": 0.8, "stop": ["s", "Q"]}])
def test_an_answer_is_what_generate_gives(parts, served, options):
    named = {"temperature": 1.0} | options
    want = plait.generate(*parts, "hello", chat=True, max_tokens=12, **named)
    answer = whole(served, "/v1/chat/completions", messages=HELLO, max_tokens=12, **options)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": want}
    parts_of = events(served, "/v1/chat/completions", messages=HELLO, max_completion_tokens=12, **options)
    deltas = [event["choices"][0]["delta"] for event in parts_of]
    assert deltas[0]["role"] == "assistant" and not any("role" in delta for delta in deltas[1:])
    assert "".join(delta.get("content", "") for delta in deltas) == want
    reasons = [event["choices"][0]["finish_reason"] for event in parts_of]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert reasons[-1] == answer["choices"][0]["finish_reason"] == ("length" if len(want) == 12 else "stop")


def test_prompts_and_answers_of_one_request(parts, served):
    """Texts and ids; answer i of a prompt draws from the seed + i."""
    _, tokenizer = parts
    answer = whole(served, "/v1/completions", prompt=["abc", tokenizer.encode("hello")], max_tokens=5, n=2, seed=3)
    want = [
        plait.generate(*parts, text, max_tokens=5, temperature=1.0, seed=seed)
        for text in ("abc", "hello")
        for seed in (3, 4)
    ]
    assert [choice["text"] for choice in answer["choices"]] == want
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    streamed = events(served, "/v1/completions", prompt=["abc", "hello"], max_tokens=5, n=2, seed=3)
    for index, text in enumerate(want):
        own = [event["choices"][0] for event in streamed if event["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in own) == text and own[-1]["finish_reason"] is not None
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["total_tokens"] - usage["completion_tokens"]) == (8, 8)


def test_usage_comes_last_where_it_is_asked_for(served):
    *_, last = events(served, "/v1/completions", prompt="abc", max_tokens=5, stream_options={"include_usage": True})
    assert last["choices"] == [] and last["usage"]["prompt_tokens"] == 3


def test_a_conversation_goes_on_from_its_state(parts):
    with listening(*parts, keep=4) as (port, _):
        first = whole(port, "/v1/chat/completions", messages=HELLO, max_tokens=5, temperature=0)
        said = first["choices"][0]["message"]
        second = whole(port, "/v1/chat/completions", messages=[*HELLO, said, *HELLO], max_tokens=5, temperature=0)
    known = first["usage"]["prompt_tokens"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= known


def test_what_there_is_besides(served):
    assert json.loads(ask(served, "/health")[1])["status"] == "ok"
    (model,) = json.loads(ask(served, "/v1/models")[1])["data"]
    assert (model["id"], model["max_model_len"]) == (MODEL, 200)


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_is_not_written_for(parts, stream):
    with listening(*parts, rows=1) as (port, batch):
        request = {"prompt": "abc", "max_tokens": 1_000_000, "stream": stream, "temperature": 0}
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(request))
            until(lambda: batch.live)
        until(lambda: not batch.live)
        assert whole(port, "/v1/completions", prompt="abc", max_tokens=2)["choices"][0]["finish_reason"]


@pytest.mark.parametrize(
    ("path", "data", "status", "message"),
    [
        ("completions", {"prompt": "x", "temprature": 1}, 400, "unknown key 'temprature'; did you mean 'temperature'?"),
        ("completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens must be a whole number, 1 or above, got 0"),
        ("completions", {"prompt": "x", "max_tokens": 500}, 400, "more than the 200 that there is room for"),
        ("completions", {"prompt": []}, 400, "prompt is empty"),
        ("completions", {"prompt": [[1, 9999]]}, 400, "outside the model's vocabulary"),
        ("completions", {"prompt": "x", "n": 0}, 400, "n must be from 1 to 128, got 0"),
        ("completions", {"prompt": "x", "logprobs": 3}, 400, "logprobs cannot be done here"),
        ("completions", {"prompt": "x", "logprobs": 0}, 400, "logprobs cannot be done here"),
        ("completions", {"prompt": [1, "a"]}, 400, "prompt[0] is 1: expected a text, token ids, or a list of either"),
        ("completions", {"prompt": "x", "presence_penalty": 1}, 400, "repetition_penalty can"),
        ("completions", {"prompt": "x", "temperature": -1}, 400, "temperature must be 0 (greedy) or above"),
        ("completions", {"prompt": "x", "model": "other"}, 404, "no model 'other' here; there is 'tiny'"),
        ("completions", b"{", 400, "the body is no JSON"),
        ("completions", [], 400, "expected a JSON object"),
        ("chat/completions", {"messages": []}, 400, "messages is empty"),
        ("chat/completions", {"messages": [{"content": "x"}]}, 400, "messages[0]: no role"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "reads text"),
        ("chat/completions", {"messages": HELLO, "tools": [{}]}, 400, "tools cannot be done here"),
        ("chat", {}, 404, "/v1/chat: no such path; expected /v1/chat/completions"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(served, path, data, status, message):
    got, text = ask(served, f"/v1/{path}", data)
    assert got == status and message in json.loads(text)["error"]["message"]


def test_what_changes_no_answer_is_let_pass(served):
    idle = {"user": "me", "logprobs": None, "frequency_penalty": 0, "tools": [], "logit_bias": None, "top_k": -1}
    assert whole(served, "/v1/completions", prompt="x", max_tokens=2, model=MODEL, **idle)["choices"]
