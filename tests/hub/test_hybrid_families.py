"""Designs of plait's own as hybrids of transformers: the same logits there, a config that any JSON reader takes, and what a
family cannot hold."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import plait
from plait.hub.families.fields import Fields
from plait.hub.families.llama import attention
from plait.hub.parity import TOLERANCE

M = plait.Mamba2(heads=6, head_dim=8, state_dim=6)
MA = plait.Mamba(state_dim=6, norms=True)
A = plait.Attention(heads=4, kv_heads=2, head_dim=8, rope=None)
E = plait.MixtureOfExperts(experts=3, hidden=20, shared_hidden=16)
DESIGNS = {
    "mamba": ("Ma3", {"Ma": MA.replace(norms=False)}),
    "mamba2": ("M3", {"M": M}),
    "bamba": ("MF AF", {"M": M.replace(dt_max=0.1), "A": A.replace(rope=plait.RoPE(fraction=0.5))}),
    "granitemoehybrid": ("ME AE", {"M": M, "A": A, "E": E}),
    "nemotron_h": ("M R A R", {"M": M, "A": A, "R": plait.ReLU2()}),
    "jamba": ("(MaF AF)2", {"Ma": MA, "A": A}),
    "bamba, no attention": ("(MF)2", {"M": M}),
    "granitemoehybrid, attention alone": ("(AF)2", {"A": A.replace(rope=plait.RoPE())}),
    "nemotron_h, no attention": ("M R", {"M": M, "R": plait.ReLU2()}),
    "jamba, no attention": ("MaF MaF", {"Ma": MA}),
}
REFUSED = {
    "a norm that the family has not": (
        "mamba2",
        "M2",
        {"M": M.replace(output_norm="none")},
        r"M#0\.output_norm: 'none'",
    ),
    "another width": ("mamba", "Ma2", {"Ma": plait.Mamba(inner_dim=30)}, r"Ma#0\.inner_dim: 30, it would be 24"),
    "attention at no period": ("jamba", "MaF AF AF MaF", {"Ma": MA, "A": A}, "A#1: attention, it would be mamba"),
    "one layer of experts": ("granitemoehybrid", "ME MF", {"M": M, "E": E}, "F#0: swiglu, it would be moe"),
    "a part of each head that turns": (
        "granitemoehybrid",
        "ME AE",
        {"M": M, "E": E, "A": A.replace(rope=plait.RoPE(fraction=0.5))},
        "this design: granitemoehybrid: rope_parameters: partial_rotary_factor 0.5 is not supported",
    ),
    "positions": (
        "nemotron_h",
        "M A",
        {"M": M, "A": A.replace(rope=plait.RoPE())},
        r"A#0\.rope: RoPE, it would be None",
    ),
}


def built(pattern, layers, tied=True):
    return plait.build(plait.ModelConfig(vocab=97, dim=24, pattern=pattern, layers=layers, tie_embeddings=tied), seed=1)


@pytest.mark.parametrize("name", DESIGNS)
@torch.no_grad()
def test_a_design_of_ones_own_runs_there(name, tmp_path):
    model, name = built(*DESIGNS[name], tied="nemotron_h" not in name), name.partition(",")[0]
    plait.export(model, tmp_path, to=name)
    json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)  # Infinity is no JSON
    tokens = torch.randint(97, (1, 20), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(input_ids=tokens, use_cache=False).logits
    assert (model(tokens)[0] - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


@pytest.mark.parametrize(("name", "pattern", "layers", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_family_cannot_hold_is_named(name, pattern, layers, message, tmp_path):
    with pytest.raises(ValueError, match=f"{name} cannot hold {message}"):
        plait.export(built(pattern, layers, tied=name != "nemotron_h"), tmp_path / "out", to=name)
    assert not (tmp_path / "out").exists()


def test_channels_that_are_no_pairs_do_not_turn():
    fields = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    sizes = {"hidden_size": 18, "num_attention_heads": 3}
    with pytest.raises(ValueError, match=r"config: partial_rotary_factor 0\.5 of 6 channels are not pairs"):
        attention(Fields(fields | sizes, "config"), partial=True)
