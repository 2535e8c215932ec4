"""NaN and infinity stop a run, name the layer they began in, and leave the last good checkpoint."""

from pathlib import Path

import pytest
import torch

from plait.model import NextToken
from plait.train import NonFinite, latest, train
from plait.train.guard import weights_finite
from plait.train.metrics import read_metrics


def weights(model, slot: int) -> None:
    next(model.slots[slot].mixer.parameters()).data.view(-1)[0] = torch.nan


def output(model, slot: int) -> None:
    model.slots[slot].mixer.register_forward_hook(lambda m, i, out: (out[0] * torch.inf, out[1]))


def gradient(model, slot: int) -> None:
    def hook(m, inputs) -> None:
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda grad: grad * torch.nan)

    model.slots[slot].mixer.register_forward_pre_hook(hook)


def weight_gradient(model, slot: int) -> None:
    next(model.slots[slot].mixer.parameters()).register_hook(lambda grad: grad * torch.nan)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("slot", [0, 2, 5])
@pytest.mark.parametrize("harm", [weights, output, gradient, weight_gradient])
def test_the_layer_is_named(make_run, quiet, harm, slot, checkpointing):
    run = make_run("DF [M|A]F DA", save_every=5, sample_every=7, activation_checkpointing=checkpointing)

    def sample(model, tokenizer, prompt: str) -> str:
        harm(model, slot)
        return ""

    with pytest.raises(NonFinite) as caught:
        train(run, sample=sample, console=quiet)
    said = str(caught.value)
    address = {0: "D#0", 2: "par#0", 5: "A#1"}[slot]
    kind = "gradient of" if "gradient" in harm.__name__ else f"{harm.__name__} of"
    assert said.startswith("step 8: ")
    assert f"{kind} {address}" in said
    assert said.endswith(f"the last good checkpoint is {latest(Path(run.folder))}")
    assert latest(Path(run.folder)).name == "step-000005"
    assert "\n" not in said


CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_no_weight_moves_from_a_step_that_is_not_finite_on(make_run, quiet, device, optimizer):
    """Step 4's gradient is no number, once. That is read when step 5, which is fine, has been queued already."""
    kept, held = {}, []

    def sample(model, tokenizer, prompt: str) -> str:
        kept.update({name: weight.detach().clone() for name, weight in model.named_parameters()})
        first = next(model.slots[0].mixer.parameters())
        held.append(first.register_hook(lambda grad: held.pop().remove() or grad * torch.nan))
        return ""

    def objective(model):
        kept["model"] = model
        return NextToken(model)

    run = make_run("DF A", sample_every=3, save_every=0, eval_every=0, device=device, optimizer=optimizer, lr=1e-2)
    with pytest.raises(NonFinite, match="step 4: gradient norm is nan"):
        train(run, objective=objective, sample=sample, console=quiet)
    model = kept.pop("model")
    assert all(torch.equal(weight, kept[name]) for name, weight in model.named_parameters())
    assert [record["step"] for record in read_metrics(Path(run.folder) / "metrics.jsonl") if "loss" in record] == [
        1,
        2,
        3,
    ]


def test_weights_that_are_not_finite_are_never_saved(make_run, quiet):
    run = make_run("DF", save_every=4, eval_every=0, sample_every=4)
    with pytest.raises(NonFinite, match="after step 4: a weight is not finite; .*the weights of F#0.*no checkpoint"):
        train(run, sample=lambda model, *_: weights(model, 1) or "", console=quiet)
    assert latest(Path(run.folder)) is None


def test_a_batch_that_overflows_is_named_by_its_loss(make_run, quiet):
    design = {"dim": 64, "pattern": "F", "tie_embeddings": False}
    run = make_run(design=design, sample_every=3, save_every=3)

    def sample(model, tokenizer, prompt: str) -> str:
        model.lm_head.weight.data.fill_(3e38)  # finite itself, so it is saved
        return ""

    with pytest.raises(NonFinite, match="step 4: loss is nan; the first value that is not finite is in the .*loss"):
        train(run, sample=sample, console=quiet)


def test_weights_finite(make_run):
    import plait

    model = plait.build({"vocab": 257, "dim": 64, "pattern": "AF"})
    assert weights_finite(model)
    model.embed.weight.data[0] = 3e38
    assert weights_finite(model)
    weights(model, 0)
    assert not weights_finite(model)
