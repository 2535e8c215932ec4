"""plait among lm-eval's models: requests as the package makes them, answers against calls without a state."""

from types import SimpleNamespace

import pytest
import torch

import plait
from plait.data import load_tokenizer

pytest.importorskip("lm_eval")
from lm_eval.api.registry import get_model

import plait.evaluate.lm_eval  # noqa: F401 (registers)

EQUAL = {"rel": 1e-5}  # float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    plait.save(plait.build(plait.ModelConfig(vocab=257, dim=64, pattern="D A")), folder, load_tokenizer("bytes"))
    return str(folder)


@pytest.fixture(params=[1, "auto"])
def lm(folder, request):
    return get_model("plait").create_from_arg_string(
        f"pretrained={folder}", {"batch_size": request.param, "device": "cpu"}
    )


def requests(*arguments):
    return [SimpleNamespace(args=given) for given in arguments]


@torch.no_grad()
def by_hand(lm, context, continuation):
    ids, ln_p = [*context, *continuation], None
    ln_p = lm.model(torch.tensor([ids]))[0][0, :-1].log_softmax(-1)[-len(continuation) :]
    return ln_p[range(len(continuation)), list(continuation)].sum().item(), ln_p.argmax(-1).tolist() == list(
        continuation
    )


def test_loglikelihood(lm):
    asked = [("One", " two"), ("One", " three"), ("", "x"), ("Two ", "four")]
    got = lm.loglikelihood(requests(*asked), disable_tqdm=True)
    ids = [(b"One", b" two"), (b"One", b" three"), ([256], b"x"), (b"Two", b" four")]
    for (value, greedy), (context, continuation) in zip(got, ids, strict=True):
        total, likeliest = by_hand(lm, list(context), list(continuation))
        assert (value, greedy) == (pytest.approx(total, **EQUAL), likeliest)


def test_loglikelihood_rolling(lm, folder):
    text = "A text of some length."
    (whole,) = lm.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    assert whole == pytest.approx(by_hand(lm, [256], text.encode())[0], **EQUAL)
    windows = get_model("plait")(folder, device="cpu", max_length=10)
    (cut,) = windows.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    ids = list(text.encode())
    # lm-eval's windows of 10: the first follows an end of text, later ones one token; the last looks back to be as long
    parts = [([256], ids[:10]), (ids[9:10], ids[10:20]), (ids[11:20], ids[20:])]
    assert cut == pytest.approx(sum(by_hand(lm, *part)[0] for part in parts), **EQUAL)


def test_generate_until(lm):
    contexts = ["One", "Two three", "Four"]
    how = {"until": ["\n\n"], "max_gen_toks": 5, "do_sample": False, "temperature": 0.0}
    got = lm.generate_until(requests(*((context, how) for context in contexts)), disable_tqdm=True)
    assert got == plait.generate(lm.model, lm.ids, contexts, max_tokens=5, stop="\n\n")
    with pytest.raises(ValueError, match="generation option 'num_beams': plait takes do_sample, "):
        lm.generate_until(requests(("One", {"num_beams": 2})), disable_tqdm=True)


def test_where_no_device_is_named(folder):
    """lm-eval's command then says cuda:0, on any machine."""
    lm = get_model("plait")(folder, device="cuda:0")
    assert lm.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
