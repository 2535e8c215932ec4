"""What torch does to a model parameter by parameter leaves weights of shared layers, and those below additions, one."""

import pytest
import torch

import plait
from plait.design.lora import LoRA
from plait.model import init_weights
from plait.model.lora import Base, adapt, merge

TOKENS = torch.arange(24).view(2, 12) % 31
SHARED = {"A": plait.Attention(shared=True, adapter_rank=4)}  # each use has additions of its own: modules of their own
DESIGN = plait.ModelConfig(vocab=31, dim=64, pattern="(AF)3", layers=SHARED)


def materialised(model):
    empty = plait.build(DESIGN, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.fill_(torch.nan)
    return init_weights(empty)


def assigned(model):
    empty = plait.build(DESIGN, device="meta")
    empty.load_state_dict({name: x.clone() for name, x in model.state_dict().items()}, assign=True)
    return empty


def assigned_and_narrowed(model):
    return assigned(model).double()


@pytest.mark.parametrize("made", [materialised, assigned, assigned_and_narrowed])
def test_shared_weights_stay_one(made):
    model = plait.build(DESIGN)
    other = made(model)
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert other.place("A#2").qkv_proj.weight is other.place("A#0").qkv_proj.weight
    torch.testing.assert_close(other(TOKENS)[0].float(), model(TOKENS)[0])


def adapted(pattern="AF DF", layers=None, **changes):
    model = plait.build(plait.ModelConfig(vocab=31, dim=64, pattern=pattern, layers=layers or {}))
    adapt(model.train(changes.pop("training", True)), LoRA(rank=4, **changes), Base("below", "hash"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


def test_additions_merge_into_the_weights_that_are_there():
    model = adapted()
    model.load_state_dict({name: x + 0.01 for name, x in model.state_dict().items()}, assign=True)
    want = model(TOKENS)[0]
    torch.testing.assert_close(merge(model)(TOKENS)[0], want, rtol=1e-4, atol=1e-4)  # float32, of sums in two orders


def test_additions_leave_out_what_slots_share_where_only_a_part_of_it_is_adapted():
    """Its weights are one, its modules are not: what is put on the first use's would be merged into all of them."""
    shared = {"F": plait.SwiGLU(shared=True, adapter_rank=2, adapted=("up_proj",))}
    model = adapted("(DF)2 [F|A]", shared)
    want = model(TOKENS)[0]
    torch.testing.assert_close(merge(model)(TOKENS)[0], want, rtol=1e-4, atol=1e-4)  # float32, of sums in two orders


def test_additions_to_a_model_that_does_not_train_drop_nothing():
    model = adapted(dropout=0.5, training=False)
    assert torch.equal(model(TOKENS)[0], model(TOKENS)[0])
