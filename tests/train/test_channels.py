"""What layers send out of a call: losses that are learned from, stats that are reduced, taps for who listens."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import plait
from plait.data import ByteTokenizer, Loader, prepare
from plait.design.layers import KINDS, LETTERS
from plait.design.weights import projection
from plait.layers import context_for
from plait.layers.stack import LAYERS
from plait.model import NextToken
from plait.model.loss import CrossEntropy, Loss
from plait.train import train
from plait.train.heldout import mean_loss
from plait.train.metrics import read_metrics
from plait.train.step import backward

CHOICES = 4


class Routed(plait.Layer, frozen=True, kw_only=True, tag="routed"):
    """Channels scaled by a router's largest share; what a balanced router would lack is `balance` times its loss."""

    balance: float = 0.1

    def weights(self, dim, reads=None):
        return (
            *projection("router", {"g": CHOICES}, reads or dim),
            *projection("out_proj", dim, reads or dim, writes=True),
        )


class RoutedLayer(plait.LayerModule):
    def forward(self, x, context, state):
        logits = self.router(x)
        context.loss("z", self.config.balance * logits.logsumexp(-1).square().mean())  # a mean over tokens
        share = logits.softmax(-1)
        context.stat("load", F.one_hot(share.argmax(-1), CHOICES).sum((0, 1)), "sum")
        return self.out_proj(context.tap("scaled", x * share.amax(-1, keepdim=True).to(x.dtype))), state


@pytest.fixture(autouse=True)
def _registered():
    tables = [(table, dict(table)) for table in (KINDS, LETTERS, LAYERS)]
    plait.register("Z", Routed, RoutedLayer)
    yield
    for table, before in tables:
        table.clear()
        table.update(before)


def made(pattern="ZF [A|ZF]", balance=0.1, **changes):
    design = {"vocab": 257, "dim": 64, "pattern": pattern, "layers": {"Z": {"kind": "routed", "balance": balance}}}
    return plait.build(design | changes, seed=1, dtype=torch.float64)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def close(a, b, **tolerances):
    torch.testing.assert_close(a, b, **(tolerances or {"rtol": 1e-10, "atol": 1e-12}))  # float64, other orders of sums


@pytest.fixture(scope="module")
def batch(corpus):
    return next(Loader(prepare(corpus, ByteTokenizer(), corpus.parent / "cache", heldout=0.2), batch=4, length=48))


def test_the_training_loss_is_the_main_one_and_the_layers(batch):
    """Its gradient too; and what is measured without gradients is the main one alone."""
    model, objective = made(), NextToken(made())
    sent = plait.Channels()
    hidden, _ = model.features(batch.inputs, cu_seqlens=batch.cu_seqlens, channels=sent)
    assert {address: set(losses) for address, losses in sent.losses.items()} == {"Z#0": {"z"}, "Z#1": {"z"}}
    own = sent.losses_by_name()["z"]
    close(own, sent.losses["Z#0"]["z"] + sent.losses["Z#1"]["z"])
    main = model.head.loss(hidden, CrossEntropy(batch.targets)).mean
    (main + own).backward()
    loss, parts = backward(objective, batch, 1, "float32")
    close(loss.double(), (main + own).double(), rtol=1e-6, atol=0)  # recorded in float32
    assert set(parts) == {"cross_entropy", "z"}
    close(parts["z"], own.detach())
    close(gradients(objective.model), gradients(model))
    with torch.no_grad():
        close(objective(batch).mean, main.detach())
    close(mean_loss(objective, [batch]).loss, main.item())


def test_a_weight_is_the_layers_own(batch):
    """Twice the weight, twice the loss and its gradient; a weight of 0, none."""

    def only(balance):
        objective = NextToken(made(balance=balance))
        backward(objective, batch, 1, "float32")
        return gradients(objective.model)

    none, once, twice = only(0.0), only(0.1), only(0.2)
    assert float((once["slots.0.mixer.router.weight"] - none["slots.0.mixer.router.weight"]).norm()) > 1e-3
    for name, value in none.items():
        close(twice[name] - value, 2 * (once[name] - value), rtol=1e-6, atol=1e-10)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own doing
@pytest.mark.parametrize("compiled", [False, True])
def test_recomputed_layers_are_counted_once(batch, compiled):
    """As it is, and compiled slot by slot as a run does it."""
    objective, other = (NextToken(made("Z [F|Z]")) for _ in range(2))
    sent, recomputed = plait.Channels(), plait.Channels()
    want = backward(objective, batch, 1, "float32", channels=sent)
    other.model.activation_checkpointing = True
    torch.compiler.reset()
    if compiled:
        for slot in other.model.slots:
            slot.compile(backend="aot_eager", fullgraph=True)
    close(backward(other, batch, 1, "float32", channels=recomputed), want)
    torch.compiler.reset()
    close(gradients(other.model), gradients(objective.model))
    assert recomputed.stats.keys() == sent.stats.keys() == {"Z#0", "Z#1"}
    assert all(torch.equal(recomputed.stats[a]["load"], sent.stats[a]["load"]) for a in sent.stats)
    assert int(sent.over_layers("load").sum()) == 2 * batch.inputs.numel()


def test_in_one_compiled_graph():
    model, tokens = made("ZA"), torch.arange(40)[None]

    def total(call):
        sent = plait.Channels()
        loss = call(tokens, channels=sent)[0].square().mean() + sent.losses_by_name()["z"]
        loss.backward()
        return loss.detach(), gradients(model), sent.stats

    want = total(model)
    torch.compiler.reset()
    close(total(torch.compile(model, fullgraph=True, backend="aot_eager")), want)
    torch.compiler.reset()


def test_parts_of_a_batch_count_by_what_they_score(batch):
    """A mean over tokens, in two parts of which each scores all its tokens, is the whole's; loads add up."""
    objective, other = NextToken(made()), NextToken(made())
    batch = type(batch)(batch.inputs, batch.inputs.roll(-1), batch.cu_seqlens, 0)
    sent, in_parts = plait.Channels(), plait.Channels()
    want = backward(objective, batch, 1, "float32", channels=sent)
    close(backward(other, batch, 3, "float32", channels=in_parts), want, rtol=1e-6, atol=0)  # summed in float32
    close(gradients(other.model), gradients(objective.model))
    assert torch.equal(in_parts.over_layers("load"), sent.over_layers("load"))


def test_hub_has_the_same_loss():
    import plait.hub

    plait.hub.register()
    model, rows = made(), torch.randint(257, (2, 30), generator=torch.Generator().manual_seed(0))
    theirs = plait.hub.PlaitForCausalLM(plait.hub.PlaitConfig(design=model.design)).double()
    theirs.model.load_state_dict(model.state_dict())
    targets = F.pad(rows[:, 1:], (0, 1), value=-100)
    sent = plait.Channels()
    hidden, _ = model.features(rows, channels=sent)
    want = model.head.loss(hidden, CrossEntropy(targets)).plus(sent.losses_by_name())
    close(theirs(rows, labels=rows).loss, want.mean)
    close(theirs(rows, labels=rows, num_items_in_batch=100).loss, want.total / 100)
    with torch.no_grad():
        close(theirs(rows, labels=rows).loss, model.head.loss(hidden, CrossEntropy(targets)).mean)


def test_a_run_records_losses_and_stats(make_run, quiet):
    design = {"dim": 64, "pattern": "ZF Z A", "layers": {"Z": {"kind": "routed", "balance": 0.1}}}
    run = make_run(design=design, steps=4, save_every=2, keep_last=9, accumulate=2)
    train(run, console=quiet)
    metrics = Path(run.folder) / "metrics.jsonl"
    whole = read_metrics(metrics)
    for record in (record for record in whole if "loss" in record):
        assert set(record["losses"]) == {"cross_entropy", "z"}
        assert sum(record["losses"].values()) == pytest.approx(record["loss"], rel=1e-6)  # of float32 sums
        assert set(record["stats"]) == {"Z#0", "Z#1"}
        assert sum(record["stats"]["Z#0"]["load"]) == 4 * 32
    assert "losses" not in whole[-1] and whole[-1]["heldout_loss"] < whole[-2]["loss"]


def test_the_same_slot_twice_counts_twice():
    model = made("ZF")
    once, twice = plait.Channels(), plait.Channels()
    hidden = torch.randn(1, 10, 64, dtype=torch.float64)
    from plait.layers import context_for

    model.run(hidden, context_for(hidden), slots=["Z#0"], channels=once)
    model.run(hidden, context_for(hidden), slots=["Z#0"], channels=twice)
    model.run(hidden, context_for(hidden), slots=["Z#0"], channels=twice)
    close(twice.losses["Z#0"]["z"], 2 * once.losses["Z#0"]["z"])
    assert torch.equal(twice.stats["Z#0"]["load"], 2 * once.stats["Z#0"]["load"])


def test_a_listener_sees_every_call(batch):
    """In branches and chains too; nothing is left afterwards."""
    model, tokens = made(), torch.arange(12)[None]
    want, seen = model(tokens)[0], {}
    names = ["Z#0.scaled", "par#0.output", "Z#1.output", "F#1.output"]
    with plait.listening(model, {name: lambda x, name=name: seen.update({name: x.shape}) for name in names}):
        assert torch.equal(model(tokens)[0], want)
        assert seen == dict.fromkeys(names, torch.Size([1, 12, 64]))
    seen.clear()
    assert torch.equal(model(tokens)[0], want) and not seen


@pytest.mark.parametrize("form", ["plain", "recomputed", "compiled"])
def test_a_listener_may_take_a_layers_place(form):
    """Two layers silenced are as if they were not there, gradients too."""
    model, alone, tokens = made("ZF [F|ZF]"), made("[F|ZF]"), torch.arange(12)[None]
    alone.slots[0], alone.embed = model.slots[2], model.embed
    alone(tokens)[0].square().sum().backward()
    want = gradients(alone)
    model.activation_checkpointing = form == "recomputed"
    torch.compiler.reset()
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if form == "compiled" else model
    with plait.listening(model, {"Z#0.output": torch.zeros_like, "F#0.output": torch.zeros_like}):
        call(tokens)[0].square().sum().backward()
    torch.compiler.reset()
    found = gradients(model)
    close(
        found["slots.2.mixer.branches.1.layers.0.router.weight"],
        want["slots.0.mixer.branches.1.layers.0.router.weight"],
    )
    close(found["embed.weight"], want["embed.weight"])


def test_nothing_is_wrong_silently():
    model, tokens = made(), torch.arange(12)[None]
    with pytest.raises(ValueError, match="Q#0"), plait.listening(model, {"Q#0.output": print}):
        pass
    wrong = pytest.raises(ValueError, match="Z#1 has no tap 'scalde'; it has output, scaled")
    with plait.listening(model, {"Z#1.scalde": print}), wrong:
        model(tokens)
    for instead, got in ((lambda x: x[:, :1], r"\(1, 1, 64\)"), (lambda x: 0.0, "float")):
        wrong = pytest.raises(ValueError, match=rf"a listener to 'output' gives \(1, 12, 64\) .* got {got}")
        with plait.listening(model, {"Z#1.output": instead}), wrong:
            model(tokens)
    with pytest.raises(ValueError, match="named 'cross_entropy', as a part of the objective"):
        Loss(torch.ones(()), torch.ones(()), {"cross_entropy": torch.ones(())}).plus({"cross_entropy": torch.ones(())})

    def sending(send):
        model.slots[0].mixer.forward = lambda x, context, state: (send(context), (x, state))[1]
        return model(tokens, channels=plait.Channels())

    one = torch.ones(())
    for send, message in (
        (lambda c: c.loss("b", torch.ones(3)), r"Z#0: loss 'b' must be .* one floating point number, got \(3,\) torch.float32"),
        (lambda c: c.loss("b", 1.0), "Z#0: loss 'b' must be .* got float"),
        (lambda c: (c.loss("b", one), c.loss("b", one)), "Z#0: loss 'b' was sent twice"),
        (lambda c: c.stat("s", 1, "max"), "Z#0: stat 's' must be a tensor or a NamedTuple of them, got int"),
        (lambda c: c.stat("s", one, "mean"), "Z#0: stat 's' is to be reduced by 'mean'; expected one of max, sum"),
        (lambda c: c.stat("load", one, "max"), "stat 'load' is reduced by"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            sending(send)


def test_the_first_layer_that_makes_nan_is_named():
    """In a slot or a branch; what comes after it is not blamed, and outside nothing is looked at."""
    model = plait.build(plait.ModelConfig(vocab=20, dim=64, pattern="AF [D|M]F"))
    tokens = torch.arange(9)[None]
    with plait.checking(model):
        model(tokens)
    with torch.no_grad():
        model.place("M#0").out_proj.weight[0, 0] = torch.nan
        model.place("F#1").up_proj.weight[0, 0] = torch.inf
    model(tokens)
    with plait.checking(model), pytest.raises(FloatingPointError, match=r"^M#0 gives NaN: 9 of 576 numbers"):
        model(tokens)
    with pytest.raises(FloatingPointError, match="^A#0 gives NaN"), plait.checking(model):
        model.run(torch.full((1, 3, 64), torch.nan), context_for(torch.zeros(1, 3, 1)))
