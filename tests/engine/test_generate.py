"""Generation: what comes out is what the model says, whoever shares the batch, however it is read."""

import itertools

import numpy as np
import pytest
import torch

import plait
from plait.data import ByteTokenizer, train_bpe
from plait.engine import Decoding, Sampling, decode, generate_tokens, prefill, stream

PATTERNS = ["AF", "MF", "DF AF", "[M|A]F", "WF"]
TOKENIZER = ByteTokenizer()
PROMPTS = ["Once upon a time", "hi", "Ünï " * 9]
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2}


def tiny(pattern="DF AF", vocab=257, layers=None):
    """A random model; float64, so that no two continuations hang on a rounding."""
    layers = layers or ({"W": plait.Attention(window=5)} if "W" in pattern else {})
    design = plait.ModelConfig(vocab=vocab, dim=64, pattern=pattern, layers=layers)
    return plait.build(design, seed=1, dtype=torch.float64)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_greedy_is_the_likeliest_token_of_the_whole_forward_pass(pattern):
    model, tokens = tiny(pattern), TOKENIZER.encode("Once")
    for _ in range(12):
        logits, _ = model(torch.tensor([tokens]))
        tokens.append(int(logits[0, -1].argmax()))
    assert generate_tokens(model, [list(b"Once")], max_tokens=12) == [tokens[4:]]
    assert plait.generate(model, TOKENIZER, "Once", max_tokens=12) == TOKENIZER.decode(tokens[4:])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_of_a_batch_are_what_they_are_alone(pattern):
    model = tiny(pattern)
    assert plait.generate(model, TOKENIZER, PROMPTS, max_tokens=12) == [
        plait.generate(model, TOKENIZER, prompt, max_tokens=12) for prompt in PROMPTS
    ]
    together = plait.generate(model, TOKENIZER, PROMPTS, max_tokens=12, seed=5, **SAMPLED)
    assert together == [
        plait.generate(model, TOKENIZER, prompt, max_tokens=12, seed=5 + row, **SAMPLED)
        for row, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture(params=[False, True], ids=["one by one", "one step ahead"])
def ahead(request, monkeypatch):
    """Steps launched before the last one's tokens are read, as on a GPU."""
    monkeypatch.setattr(decode, "runs_ahead", lambda device: request.param)


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("pattern", ["DF AF", "[M|W]F"])
def test_rows_that_end_early_leave_the_others_as_they_are(pattern):
    model = tiny(pattern)
    prompts = [list(prompt.encode()) for prompt in PROMPTS]
    sampling = Sampling(temperature=2.0, seed=3, repetition_penalty=1.3)
    free = generate_tokens(model, prompts, max_tokens=30, sampling=sampling)
    eos = free[1][7]
    expected = [list(itertools.takewhile(lambda token: token != eos, row)) for row in free]
    assert len({len(row) for row in expected}) > 1
    assert generate_tokens(model, prompts, max_tokens=30, sampling=sampling, eos=eos) == expected


def test_the_end_of_text_ends_the_text():
    model = tiny()
    free = generate_tokens(model, [[1]], max_tokens=8)[0]
    tokenizer = ByteTokenizer()
    tokenizer.eos = free[5]
    cut = free[: free.index(free[5])]
    assert plait.generate(model, tokenizer, "\x01", max_tokens=8) == ByteTokenizer().decode(cut)


def test_samples_depend_on_the_seed_alone():
    model = tiny()
    options = {"max_tokens": 12, "temperature": 1.5, "top_k": 40, "min_p": 0.001}
    first = plait.generate(model, TOKENIZER, "a", seed=1, **options)
    torch.manual_seed(9)
    assert plait.generate(model, TOKENIZER, "a", seed=1, **options) == first
    assert plait.generate(model, TOKENIZER, "a", seed=2, **options) != first
    assert len(set(plait.generate(model, TOKENIZER, ["a"] * 4, seed=1, **options))) == 4
    unseeded = []
    for _ in range(2):
        torch.manual_seed(9)
        unseeded += [plait.generate(model, TOKENIZER, "a", **options) for _ in range(2)]
    assert unseeded[:2] == unseeded[2:]
    assert unseeded[0] != unseeded[1]


@pytest.mark.parametrize("stop", [(), "zzzz", "{mid}", ["zz", "{late}", "{mid}"]])
@pytest.mark.parametrize(
    "tokenizer", [TOKENIZER, train_bpe(["äöü once upon a time 日本 " * 20], 300)], ids=["bytes", "bpe"]
)
def test_streamed_pieces_are_the_text(tokenizer, stop):
    model = tiny(vocab=300)
    options = {"max_tokens": 48, "temperature": 1.0, "seed": 4}
    whole = plait.generate(model, tokenizer, "Once", **options)
    marks = {"mid": whole[14:19], "late": whole[17:25]}
    stops = [text.format(**marks) for text in ([stop] if isinstance(stop, str) else stop)]
    ends = [(whole.find(text) + len(text), whole.find(text)) for text in stops if text in whole]
    expected = whole[: min(ends)[1]] if ends else whole
    pieces = list(stream(model, tokenizer, "Once", stop=stops, **options))
    assert "".join(pieces) == expected == plait.generate(model, tokenizer, "Once", stop=stops, **options)
    assert all(pieces)
    assert len(pieces) > 4


def test_a_stop_string_ends_only_its_own_row():
    model = tiny()
    how = {"max_tokens": 24, "temperature": 2.0, "seed": 0}
    free = plait.generate(model, TOKENIZER, PROMPTS, **how)
    stop = next(free[1][i : i + 2] for i in range(24) if all(free[1][i : i + 2] not in free[r] for r in (0, 2)))
    cut = plait.generate(model, TOKENIZER, PROMPTS, **how, stop=stop)
    assert cut == [free[0], free[1][: free[1].index(stop)], free[2]]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_long_prompts_are_read_in_bounded_calls(pattern, monkeypatch):
    model = tiny(pattern)
    prompts = [list(range(n)) for n in (3, 40, 5, 2, 4, 4, 23)]
    whole = generate_tokens(model, prompts, max_tokens=6)
    read, features = [], model.features
    monkeypatch.setattr(prefill, "CHUNK", 8)
    monkeypatch.setattr(
        model, "features", lambda tokens, *a, **k: read.append(tokens.numel()) or features(tokens, *a, **k)
    )
    assert generate_tokens(model, prompts, max_tokens=6) == whole
    assert max(read) == 8
    assert read[:9] == [3, 8, 8, 8, 8, 8, 7, 8, 8]


def test_a_recurrent_stack_decodes_in_constant_memory():
    decoding = Decoding(tiny("DF MF [M|D]F WF"), [[1, 2, 3]], max_tokens=200)
    before = decoding.pool.tensors
    sizes = {decoding.step() and decoding.pool.nbytes for _ in range(100)}
    assert len(sizes) == 1
    assert all(
        x.data_ptr() == y.data_ptr() for x, y in zip(before.values(), decoding.pool.tensors.values(), strict=True)
    )


def test_a_step_ahead_is_no_step_too_many(monkeypatch):
    monkeypatch.setattr(decode, "runs_ahead", lambda device: True)
    decoding = Decoding(tiny(), [[1, 2, 3], [4]], max_tokens=3)
    lengths = []
    for _ in range(3):
        decoding.step()
        lengths.append(decoding.pool.lengths[:2])
    assert lengths == [[4, 2], [5, 3], [5, 3]]  # the last new token is not read


def test_rows_that_leave_free_their_room_and_the_others_close_up():
    decoding = Decoding(tiny("DF AF"), [[1], [2, 3], [4]], max_tokens=8)
    decoding.step()
    decoding.leave({0, 2})
    assert decoding.rows == [1]
    assert decoding.pool.free_rows == decoding.pool.free_pages == 2
    assert decoding.pool.lengths == [2, 0, 0]


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("page", [None, 4])
def test_a_pool_grows_with_long_texts(page, monkeypatch):
    model, prompts = tiny("DF AF WF"), [[1, 2, 3], [4]]
    want = generate_tokens(model, prompts, max_tokens=40)
    monkeypatch.setattr(decode, "ROOM", 3)
    if page is not None:
        init_pool = model.init_pool
        monkeypatch.setattr(model, "init_pool", lambda rows, length, **_: init_pool(rows, length, page=page))
    assert generate_tokens(model, prompts, max_tokens=40) == want


def test_the_model_is_left_as_it_was():
    model = tiny().train()
    plait.generate(model, TOKENIZER, "a", max_tokens=2)
    assert model.training
    assert model.slots[0].training
    pieces = stream(model, TOKENIZER, "abc", max_tokens=20)
    next(pieces)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    pieces.close()
    assert model.training
    model.eval()
    plait.generate(model, TOKENIZER, "a", max_tokens=2)
    assert not model.training


def test_ids_that_the_tokenizer_lacks_are_never_chosen():
    model = tiny(vocab=4000)
    assert max(generate_tokens(model, [[1]], max_tokens=20)[0]) > 256
    assert plait.generate(model, TOKENIZER, "a", max_tokens=20)


def test_no_prompts_give_no_texts():
    assert plait.generate(tiny(), TOKENIZER, []) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "the prompt is empty: expected at least one token"),
        ({"prompt": ["a", ""]}, "prompt 1 is empty"),
        ({"prompt": ["a", 3]}, "prompt 1 is of type int, expected str"),
        ({"max_tokens": 0}, "max_tokens must be a whole number, 1 or above, got 0"),
        ({"max_tokens": 2.5}, "max_tokens must be a whole number"),
        ({"temperature": -1}, "temperature must be 0 \\(greedy\\) or above, got -1"),
        ({"temperature": float("nan")}, "Sampling.temperature: expected a finite number, got nan"),
        ({"temperature": "hot"}, "Sampling.temperature: expected a number, got .hot."),
        ({"temperature": 1, "top_k": 0}, "top_k must be 1 or above, got 0"),
        ({"temperature": 1, "top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
        ({"temperature": 1, "min_p": 1.5}, "min_p must be from 0 to 1, got 1.5"),
        *(({"max_tokens": value}, "max_tokens must be a whole number") for value in (True, "9", float("inf"))),
        *(
            ({"temperature": 1.0} | {name: value}, name)
            for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
            for value in (float("nan"), float("inf"), -float("inf"), True, "1")
        ),
        ({"temperature": 10**400}, "temperature"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"top_p": 0.9}, "top_p=0.9 does nothing at temperature 0; give temperature=1.0 too"),
        ({"stop": ["a", ""]}, "stop holds ''; expected strings of at least one character"),
    ],
)
def test_wrong_calls_say_what_would_be_right(options, message):
    model = tiny()
    with pytest.raises(ValueError, match=message) as error:
        plait.generate(model, TOKENIZER, **{"prompt": "a", **options})
    assert "\n" not in str(error.value)
    if not isinstance(options.get("prompt"), list):
        with pytest.raises(ValueError, match=message):
            stream(model, TOKENIZER, **{"prompt": "a", **options})


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-310},
        {"temperature": 1e308},
        {"temperature": 1.0, "top_k": 10**400},
        {"temperature": 1.0, "top_p": 1e-310},
        {"temperature": 1.0, "repetition_penalty": 1e308},
        {"temperature": 1.0, "repetition_penalty": 1e-308},
        {"temperature": 1.0, "seed": -(10**30)},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_numbers_still_choose(options, dtype):
    model, prompts = tiny().to(dtype), [[3, 4], [5]]
    rows = generate_tokens(model, prompts, max_tokens=4, sampling=Sampling(**{"seed": 0} | options))
    assert [len(row) for row in rows] == [4, 4]
    if options["temperature"] < 1:
        assert rows == generate_tokens(model, prompts, max_tokens=4)


def test_prompts_of_any_kind():
    model = tiny()
    want = generate_tokens(model, [[3, 4], [5, 6]], max_tokens=3)
    for prompts in (torch.tensor([[3, 4], [5, 6]]), np.array([[3, 4], [5, 6]]), [torch.tensor([3, 4]), (5, 6)]):
        assert generate_tokens(model, prompts, max_tokens=np.int64(3)) == want


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "the prompt is empty"),
        ([[3], [257]], "prompt 1: token id 257 is outside the model's vocabulary of 257"),
        ([[-1]], "a token id must be a whole number, 0 or above, got -1"),
        ([[1.5]], "a token id must be a whole number, 0 or above, got 1.5"),
        ([[True]], "a token id must be a whole number, 0 or above, got True"),
        ([3, 4], "prompt 0 must be a sequence of token ids, as in"),
    ],
)
def test_ids_that_cannot_be_read(prompts, message):
    with pytest.raises(ValueError, match=message):
        generate_tokens(tiny(), prompts, max_tokens=3)


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match="the tokenizer \\(bytes\\) has 257 ids, but the model was built for 61"):
        plait.generate(tiny(vocab=61), TOKENIZER, "a")


@pytest.mark.parametrize(
    ("ends", "what"),
    [
        ({"head": plait.Regression(outputs=3)}, "Tokens to Regression"),
        ({"front": plait.Vectors(features=3)}, "Vectors to Logits"),
    ],
)
def test_numbers_are_no_text(ends, what):
    model = plait.build(plait.ModelConfig(vocab=257, dim=64, pattern="AF", **ends))
    with pytest.raises(ValueError, match=f"from Tokens to Logits; this one goes from {what}"):
        plait.generate(model, TOKENIZER, "a", max_tokens=2)
    with pytest.raises(ValueError, match=f"from Tokens to Logits; this one goes from {what}"):
        generate_tokens(model, [[1]], max_tokens=2)


def test_texts_end_where_positions_do():
    """Learned ones, too."""
    model = plait.build(plait.ModelConfig(vocab=257, dim=64, pattern="MF", front=plait.Tokens(positions=10)))
    assert plait.generate(model, TOKENIZER, "abc", max_tokens=8)
    with pytest.raises(ValueError, match="longer than this model's positions go .max_positions 10.; give max_tokens=8"):
        plait.generate(model, TOKENIZER, "abc", max_tokens=9)


def test_texts_end_where_rope_does():
    model = tiny("AF", layers={"A": plait.Attention(rope=plait.RoPE(max_positions=16))})
    assert len(generate_tokens(model, [[1] * 10], max_tokens=7)[0]) == 7
    with pytest.raises(ValueError, match="max_positions 16\\); give max_tokens=7 or fewer"):
        generate_tokens(model, [[1] * 10], max_tokens=8)
    with pytest.raises(ValueError, match="the prompt of 20 tokens .* shorten it"):
        generate_tokens(model, [[1] * 20], max_tokens=1)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}])
def test_a_diverged_model_is_told(options):
    model = tiny()
    model.slots[0].norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite: its weights have diverged"):
        plait.generate(model, TOKENIZER, "a", **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_gpu_writes_the_same_text(pattern):
    model = tiny(pattern)
    calls = [{"max_tokens": 12}, {"max_tokens": 12, "seed": 5, "min_p": 0.001, **SAMPLED}]
    texts = [plait.generate(model, TOKENIZER, PROMPTS, **options) for options in calls]
    model.cuda()
    assert [plait.generate(model, TOKENIZER, PROMPTS, **options) for options in calls] == texts
