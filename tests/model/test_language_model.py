"""The model's own promises: seeds, loss, refusals, and what is printed."""

import pytest
import torch
import torch.nn.functional as F

import plait
from plait.model import loss as losses
from plait.model import token_loss
from plait.state import ModelState

DESIGN = plait.ModelConfig(vocab=31, dim=64, pattern="[M|A]F D", layers={"F": plait.SwiGLU(hidden=48)})
TOKENS = torch.arange(24).view(2, 12) % 31


@pytest.fixture(scope="module")
def model():
    return plait.build(DESIGN)


class TestBuild:
    def test_depends_on_the_seed_alone(self):
        torch.manual_seed(1)
        first = plait.build(DESIGN, seed=5)
        before = torch.get_rng_state()
        again, other = plait.build(DESIGN, seed=5), plait.build(DESIGN, seed=6)
        assert torch.equal(torch.get_rng_state(), before)
        for name, x in first.named_parameters():
            assert torch.equal(x, again.get_parameter(name))
        assert not torch.equal(first.embed.weight, other.embed.weight)

    def test_streams_keep_their_size(self):
        """Activations stay near 1 whatever the width and depth."""
        for dim, pattern in ((64, "AF"), (512, "((DF)3 AF)2"), (256, "([M|A]F)8")):
            model = plait.build(plait.ModelConfig(vocab=31, dim=dim, pattern=pattern))
            with torch.no_grad():
                logits, _ = model(TOKENS)
            assert 0.3 < logits.std() < 3

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_dtypes(self, dtype):
        model = plait.build(DESIGN, dtype=dtype)
        for name, x in model.named_parameters():
            special = name.rsplit(".", 1)[-1] in ("A_log", "dt_bias", "D")
            assert x.dtype == (torch.promote_types(dtype, torch.float32) if special else dtype)
        logits, state = model(TOKENS, model.init_state(2))
        assert logits.dtype == model.dtype == dtype
        assert logits.isfinite().all()
        logits.sum().backward()

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    @pytest.mark.parametrize("dtype", ["float32", torch.int64, torch.float8_e5m2, torch.complex64, None])
    def test_a_dtype_that_is_none(self, dtype, device):
        with pytest.raises(ValueError, match=f"dtype must be one of torch.float64, torch.float32, .*; got {dtype!r}"):
            plait.build(DESIGN, dtype=dtype, device=device)

    def test_from_a_name_or_data(self):
        assert plait.build("tiny").design == plait.load_design("tiny")
        assert plait.build(DESIGN.to_dict()).design == DESIGN
        for wrong in (None, 3, ["AF"]):
            with pytest.raises(ValueError, match="a design is a ModelConfig, plain data, or the name of"):
                plait.build(wrong)

    def test_tied_and_untied(self):
        tied = plait.build(DESIGN)
        untied = plait.build(DESIGN.replace(tie_embeddings=False))
        difference = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
        assert difference == 31 * 64


class TestCalls:
    def test_pairs(self, model):
        logits, nothing = model(TOKENS)
        assert logits.shape == (2, 12, 31)
        assert nothing is None
        _, state = model(TOKENS, model.init_state(2))
        assert state.lengths == (12, 12)

    def test_head_of_features(self, model):
        hidden, _ = model.features(TOKENS)
        assert torch.equal(model.head(hidden), model(TOKENS)[0])

    def test_padding_is_zero_and_the_last_token_is_last(self, model):
        mask = torch.ones_like(TOKENS)
        mask[0, :5] = 0
        hidden, _ = model.features(TOKENS, attention_mask=mask)
        assert hidden[0, :5].count_nonzero() == 0
        alone, _ = model.features(TOKENS[:1, 5:])
        assert torch.allclose(hidden[0, -1], alone[0, -1], atol=1e-5)

    def test_a_mask_of_ones_is_no_mask(self, model):
        assert torch.equal(model(TOKENS, attention_mask=torch.ones_like(TOKENS))[0], model(TOKENS)[0])

    @pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.int64])
    def test_masks_of_any_dtype(self, model, kind):
        mask = torch.ones_like(TOKENS)
        mask[1, 9:] = 0
        assert torch.equal(model(TOKENS, attention_mask=mask.to(kind))[0], model(TOKENS, attention_mask=mask)[0])

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            ({"tokens": TOKENS[0]}, r"integers of shape \(batch, time\), got \(12,\)"),
            ({"tokens": TOKENS.float()}, "integers of shape"),
            ({"tokens": TOKENS.bool()}, r"integers of shape .* got \(2, 12\) torch.bool"),
            ({"tokens": TOKENS.tolist()}, r"a tensor of integers .* as in torch.tensor\(\[\[1, 2\]\]\); got list"),
            ({"tokens": TOKENS.to("meta")}, r"tokens are on meta, the model is on cpu: give tokens.to\(model.device\)"),
            ({"state": (1, 2)}, r"state must come from model.init_state\(\) or an earlier call, got tuple"),
            ({"tokens": TOKENS[:1], "cu_seqlens": torch.tensor([0.0, 12.0])}, r"integers of shape .* torch.float32"),
            ({"tokens": TOKENS[:1], "cu_seqlens": torch.tensor([0, float("nan")])}, "cu_seqlens must be integers"),
            ({"tokens": TOKENS[:1], "cu_seqlens": torch.tensor([[0, 12]])}, r"cu_seqlens must be .* got \(1, 2\)"),
            ({"tokens": TOKENS[:1], "cu_seqlens": torch.tensor([False, True])}, "cu_seqlens must be integers"),
            ({"tokens": TOKENS[:, :0]}, "tokens are empty"),
            ({"tokens": TOKENS + 20}, "token id 43 is outside the model's vocabulary of 31"),
            ({"tokens": TOKENS - 1}, "token id -1 is outside"),
            (
                {"attention_mask": torch.ones(2, 3)},
                r"attention_mask must have the tokens' shape \(2, 12\), got \(2, 3\)",
            ),
            ({"attention_mask": torch.zeros(2, 12)}, "row 0 is all padding"),
            ({"cu_seqlens": torch.tensor([0, 12])}, "packed in one row, got a batch of 2"),
            ({"tokens": TOKENS[:1], "cu_seqlens": torch.tensor([0, 5])}, "from 0 to the number of tokens, 12"),
            ({"tokens": TOKENS[:1], "cu_seqlens": torch.tensor([0, 5, 5, 12])}, "document 1 has 0 tokens"),
            ({"tokens": TOKENS[:1], "cu_seqlens": torch.tensor([0, 7, 5, 12])}, "document 1 has -2 tokens"),
            ({"cu_seqlens": torch.tensor([0, 12]), "attention_mask": torch.ones(2, 12)}, "not both"),
        ],
    )
    def test_refusals(self, model, call, message):
        with pytest.raises(ValueError, match=message):
            model(**{"tokens": TOKENS} | call)

    def test_a_compiled_graph_refuses_the_same_documents(self):
        layers = {"A": plait.Attention(rope=plait.RoPE(max_positions=8)), "F": plait.SwiGLU(hidden=8)}
        model = torch.compile(plait.build(DESIGN.replace(layers=layers)), fullgraph=True, backend="eager")
        model(TOKENS[:1], cu_seqlens=torch.tensor([0, 5, 12]))
        for cuts, message in (
            ([0, 5, 9], "from 0 to the number of tokens, 12"),
            ([0, 12, 12], "document 1 has 0 tokens"),
            ([0, 1, 12], "11 tokens is longer than this model's positions go"),
        ):
            with pytest.raises(ValueError, match=message):
                model(TOKENS[:1], cu_seqlens=torch.tensor(cuts))
        torch.compiler.reset()

    @pytest.mark.parametrize("name", ["uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"])
    def test_tokens_and_offsets_of_any_integer_dtype(self, model, name):
        kind, row, offsets = getattr(torch, name), TOKENS[:1], torch.tensor([0, 5, 12])
        assert torch.equal(model(row.to(kind), cu_seqlens=offsets.to(kind))[0], model(row, cu_seqlens=offsets)[0])

    def test_a_state_elsewhere(self, model):
        with pytest.raises(ValueError, match=r"the state is on meta, the model on cpu: give state.to\(model.device\)"):
            model(TOKENS, model.init_state(2).to("meta"))

    def test_a_compiled_graph_refuses_rows_that_begin_beside_rows_that_go_on(self):
        """Of which the first need meta tokens that the others have read."""
        model = plait.build({"vocab": 31, "dim": 64, "pattern": "AF", "front": {"kind": "tokens", "meta": 3}})
        with torch.no_grad():
            states = ModelState.join([model.init_state(), model(TOKENS[:1], model.init_state())[1]])
            with pytest.raises(Exception, match="rows that begin beside rows that go on"):
                torch.compile(model, fullgraph=True, backend="eager")(TOKENS, states)
        torch.compiler.reset()

    @pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"])
    @pytest.mark.parametrize("pattern", ["[M|A]F D", "GF WF", "HF"])
    def test_defaults_of_the_process_change_nothing(self, pattern, default):
        """Not the default dtype, nor the default device; nor tables that are kept from a call in inference mode."""
        model = plait.build(DESIGN.replace(pattern=pattern, layers={}))

        def run():
            logits, state = model(
                TOKENS.view(1, -1), model.init_state(2), cu_seqlens=torch.tensor([0, 9, 24], device="cpu")
            )
            logits = torch.cat([logits[0, 7:9], model(TOKENS[:, :1], state)[0][:, 0]])
            grads = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
            return [logits, *grads, *state.tensors().values()]

        with torch.inference_mode():
            model(TOKENS.view(1, -1), cu_seqlens=torch.tensor([0, 9, 24]))
        want = run()
        if default == "meta":
            with torch.device("meta"):
                got = run()
        else:
            before = torch.get_default_dtype()
            torch.set_default_dtype(default)
            try:
                got = run()
            finally:
                torch.set_default_dtype(before)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)

    def test_longer_than_rope_allows(self):
        layers = {"A": plait.Attention(rope=plait.RoPE(max_positions=16)), "F": plait.SwiGLU(hidden=8)}
        model = plait.build(DESIGN.replace(layers=layers))
        _, state = model(TOKENS, model.init_state(2))
        model(TOKENS[:, :4], state)
        with pytest.raises(
            ValueError, match=r"17 tokens is longer than this model's positions go \(max_positions 16\)"
        ):
            model(TOKENS[:, :5], state)
        packed = TOKENS.view(1, -1)
        model(packed, cu_seqlens=torch.tensor([0, 12, 24]))  # two of twelve, not one of twenty-four
        with pytest.raises(ValueError, match="24 tokens is longer"):
            model(packed)

    def test_checkpointing_changes_nothing(self):
        gradients = []
        for on in (False, True):
            model = plait.build(DESIGN)
            model.activation_checkpointing = on
            model(TOKENS)[0].square().sum().backward()
            gradients.append([p.grad for p in model.parameters()])
        for a, b in zip(*gradients, strict=True):
            assert torch.equal(a, b)

    def test_print(self, model):
        text = str(model)
        assert "'[M|A]F D'" in text
        assert "parameters in all" in text
        assert "131,072 tokens" in text


class TestLoss:
    targets = torch.where(TOKENS % 5 == 0, -100, (TOKENS * 7) % 31)

    def plain(self, model):
        logits, _ = model(TOKENS)
        return F.cross_entropy(logits.flatten(0, 1).float(), self.targets.flatten(), reduction="sum", ignore_index=-100)

    @pytest.mark.parametrize("size", [losses.SLICE, 31 * 7, 1])
    @pytest.mark.parametrize("tied", [True, False])
    def test_is_cross_entropy_in_any_slices(self, size, tied, monkeypatch):
        monkeypatch.setattr(losses, "SLICE", size)
        model = plait.build(DESIGN.replace(tie_embeddings=tied))
        total, scored = token_loss(model, TOKENS, self.targets)
        want = self.plain(model)
        assert scored == (self.targets != -100).sum()
        assert torch.allclose(total, want)
        got = torch.autograd.grad(total, list(model.parameters()))
        for a, b in zip(got, torch.autograd.grad(want, list(model.parameters())), strict=True):
            assert torch.allclose(a, b, atol=1e-4)
        with torch.no_grad():
            assert torch.allclose(token_loss(model, TOKENS, self.targets)[0], want)

    def test_bfloat16_sums_in_float32(self):
        model = plait.build(DESIGN, dtype=torch.bfloat16)
        total, _ = token_loss(model, TOKENS, self.targets)
        assert total.dtype == torch.float32
        assert torch.allclose(total, self.plain(model), rtol=1e-2)

    def test_packed(self, model):
        offsets = torch.tensor([0, 12, 24], dtype=torch.int32)
        packed, scored = token_loss(model, TOKENS.view(1, -1), self.targets.view(1, -1), cu_seqlens=offsets)
        rows, same = token_loss(model, TOKENS, self.targets)
        assert scored == same
        assert torch.allclose(packed, rows)

    def test_nothing_to_score(self, model):
        total, scored = token_loss(model, TOKENS, torch.full_like(TOKENS, -100))
        assert (total.item(), scored) == (0.0, 0)

    def test_shapes_must_match(self, model):
        with pytest.raises(ValueError, match=r"targets must have the inputs' shape \(2, 12\)"):
            token_loss(model, TOKENS, TOKENS[:, 1:])
