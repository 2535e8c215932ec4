"""plait's folders in transformers: the same weights, the same text, the same loss, and back."""

import json

import pytest
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

import plait
import plait.hub
from plait.data import ByteTokenizer, train_bpe
from plait.design.layers import KINDS, LETTERS
from plait.engine import generate_tokens
from plait.hub import PlaitCache, PlaitConfig, PlaitForCausalLM
from plait.model import token_loss

PATTERNS = ["AF", "MF", "DF AF", "[M|A]F", "WF"]
TOKENIZER = ByteTokenizer()
PROMPTS = ["Once upon a time", "hi", "Ünï " * 5]


@pytest.fixture(autouse=True)
def _registered():
    plait.hub.register()
    plait.hub.register()


def tiny(pattern="DF AF", vocab=257, dtype=torch.float64, **options):
    layers = {"W": plait.Attention(window=5)} if "W" in pattern else {}
    return plait.build(
        plait.ModelConfig(vocab=vocab, dim=64, pattern=pattern, layers=layers, **options), seed=1, dtype=dtype
    )


def reload(model, folder, tokenizer=None, **options):
    plait.save(model, folder, tokenizer)
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def same(a, b):
    """Equal names and values, to the bit."""
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, train_bpe(["once upon a time " * 20], 270)], ids=["bytes", "bpe"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_greedy_text_is_plaits(pattern, tokenizer, tmp_path):
    model = tiny(pattern, vocab=tokenizer.vocab)
    theirs = reload(model, tmp_path, tokenizer)
    reader = AutoTokenizer.from_pretrained(tmp_path, padding_side="left", pad_token="<|endoftext|>")
    batch = reader(PROMPTS, return_tensors="pt", padding=True)
    ids, mask = batch.input_ids, batch.attention_mask
    assert (mask == 0).any()
    output = theirs.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20)
    texts = reader.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    assert texts == plait.generate(model, tokenizer, PROMPTS, max_tokens=20)
    again = theirs.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20, use_cache=False)
    assert again.tolist() == output.tolist()


def test_generate_ends_at_the_end_of_text(tmp_path):
    model, tokenizer = tiny(), ByteTokenizer()
    free = generate_tokens(model, [[97]], max_tokens=12)[0]
    tokenizer.eos = free[4]
    theirs = reload(model, tmp_path, tokenizer)
    output = theirs.generate(torch.tensor([[97]]), do_sample=False, max_new_tokens=12)
    assert output[0, 1:].tolist() == free[: free.index(free[4]) + 1]


@pytest.mark.parametrize("pattern", ["DF AF", "[M|A]F"])
def test_beams_and_several_samples_keep_their_states(pattern, tmp_path):
    theirs = reload(tiny(pattern), tmp_path)
    ids = torch.tensor([list(b"Once"), list(b"upon")])
    for options in ({"num_beams": 3, "do_sample": False}, {"num_return_sequences": 2, "do_sample": True}):
        outputs = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            outputs.append(theirs.generate(ids, max_new_tokens=8, use_cache=use_cache, **options).tolist())
        assert outputs[0] == outputs[1]


def test_a_cache_goes_on_where_it_stood(tmp_path):
    theirs = reload(tiny(), tmp_path)
    ids = torch.tensor([list(b"Once upon a time")])
    whole = theirs(ids, use_cache=False)
    assert whole.past_key_values is None
    cache = None
    for part in ids.split([5, 1, 10], 1):
        output = theirs(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
    assert isinstance(cache, PlaitCache)
    assert cache.get_seq_length() == 16 == cache.state.lengths[0]
    torch.testing.assert_close(output.logits, whole.logits[:, 6:])
    greedy = {"do_sample": False, "max_new_tokens": 5}
    output = theirs.generate(ids, past_key_values=PlaitCache(), prefill_chunk_size=4, **greedy)
    assert output.tolist() == theirs.generate(ids, **greedy).tolist()
    with pytest.raises(ValueError, match="cannot be cut back"):
        cache.crop(1)
    with pytest.raises(ValueError, match="must be a plait.hub.PlaitCache, got DynamicCache"):
        theirs(ids, past_key_values=DynamicCache())


def test_logits_to_keep(tmp_path):
    theirs = reload(tiny(), tmp_path)
    ids = torch.tensor([list(b"Once upon")])
    whole = theirs(ids).logits
    torch.testing.assert_close(theirs(ids, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(theirs(ids, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pattern", ["DF AF", "[M|A]:projection F"])
def test_weights_make_the_round_trip(pattern, tied, tmp_path):
    model = tiny(pattern, dtype=torch.float32, tie_embeddings=tied)
    theirs = reload(model, tmp_path / "ours")
    assert same(model, theirs.model)
    theirs.save_pretrained(tmp_path / "theirs")
    assert same(model, plait.load(tmp_path / "theirs"))
    assert plait.load(tmp_path / "theirs").design == model.design
    assert same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").model)
    names = [set(safetensors.torch.load_file(tmp_path / who / "model.safetensors")) for who in ("ours", "theirs")]
    assert names[0] == names[1]


@pytest.mark.parametrize("rank", [None, 2])
def test_shared_layers_make_the_round_trip(rank, tmp_path):
    """Their weights are in a file once, and one tensor after loading. LoRA leaves out those with additions of each use."""
    shared = plait.Attention(shared=True, adapter_rank=rank)
    design = plait.ModelConfig(vocab=61, dim=64, pattern="QFQ", layers={"Q": shared})
    model = plait.build(design)
    theirs = reload(model, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for again in (theirs, AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")):
        assert same(model, again.model)
        first, second = (again.model.slots[i].mixer.qkv_proj for i in (0, 2))
        assert first.weight is second.weight
    assert same(model, plait.load(tmp_path / "theirs"))
    theirs.load_state_dict(safetensors.torch.load_file(tmp_path / "ours" / "model.safetensors"))
    targets = plait.hub.lora_targets(design)
    assert ("slots.0.mixer.qkv_proj" in targets) is (rank is None)
    assert "slots.1.mixer.down_proj" in targets and "slots.2.mixer.qkv_proj" not in targets


def test_decay_parameters_stay_float32(tmp_path):
    half = reload(tiny("MF DF", dtype=torch.bfloat16), tmp_path)
    kinds = {name.rsplit(".", 1)[-1]: p.dtype for name, p in half.named_parameters()}
    assert {name for name, kind in kinds.items() if kind == torch.float32} == {"A_log", "dt_bias", "D"}
    assert same(half.model, plait.load(tmp_path))
    single = reload(tiny("MF DF", dtype=torch.float32), tmp_path, dtype=torch.bfloat16)
    assert same(single.model, plait.load(tmp_path, dtype=torch.bfloat16))


def test_fresh_weights_are_plaits(tmp_path):
    design = plait.ModelConfig(vocab=61, dim=64, pattern="MF DF [M|A]:merge_attention F")
    torch.manual_seed(3)
    theirs = AutoModelForCausalLM.from_config(PlaitConfig(design=design))
    assert same(theirs.model, plait.build(design, seed=3))


def test_a_state_dict_from_a_folder_can_be_loaded(tmp_path):
    model = tiny(dtype=torch.float32)
    theirs = reload(model, tmp_path)
    torch.nn.init.zeros_(theirs.model.embed.weight)
    theirs.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert same(model, theirs.model)
    theirs.load_state_dict(theirs.state_dict())


def test_missing_and_unused_tensors_are_errors(tmp_path):
    plait.save(tiny(dtype=torch.float32), tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    tensors["stray"] = tensors.pop("norm.weight")
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="missing tensors \\['model.norm.weight'\\], unused tensors \\['stray'\\]"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_plaits(side, tmp_path):
    model = tiny()
    theirs = reload(model, tmp_path)
    rows = [list(b"Once upon a time"), list(b"there was")]
    longest = max(map(len, rows))
    pads = [[256] * (longest - len(row)) for row in rows]
    place = (lambda pad, row: pad + row) if side == "left" else (lambda pad, row: row + pad)
    ids = torch.tensor([place(pad, row) for pad, row in zip(pads, rows, strict=True)])
    mask = torch.tensor([place([0] * len(p), [1] * len(r)) for p, r in zip(pads, rows, strict=True)])
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 5:8] = -100
    output = theirs(ids, attention_mask=mask, labels=labels)
    total, count = 0.0, 0
    for row, pad in zip(labels.tolist(), pads, strict=True):
        targets = [t for t, m in zip(row, place([0] * len(pad), [1] * (len(row) - len(pad))), strict=True) if m]
        inputs = rows[labels.tolist().index(row)]
        nll, scored = token_loss(model, torch.tensor([inputs[:-1]]), torch.tensor([targets[1:]]))
        total, count = total + nll, count + scored
    torch.testing.assert_close(output.loss, total / count)
    assert output.logits.shape == (2, longest, 257)
    torch.testing.assert_close(theirs(ids, mask, labels=labels, num_items_in_batch=7).loss, total / 7)


def test_a_training_step_and_its_checkpointed_twin(tmp_path):
    theirs = reload(tiny("DF [M|A]F"), tmp_path).train()
    ids = torch.tensor([list(b"Once upon a time")])
    gradients = []
    for enable in (False, True):
        theirs._set_gradient_checkpointing(enable)
        assert theirs.is_gradient_checkpointing is theirs.model.activation_checkpointing is enable
        theirs.zero_grad()
        output = theirs(ids, labels=ids)
        assert output.past_key_values is None
        output.loss.backward()
        gradients.append([p.grad for p in theirs.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_.*:FutureWarning")
def test_gradient_checkpointing_by_its_usual_name(tmp_path):
    theirs = reload(tiny(dtype=torch.float32), tmp_path)
    theirs.gradient_checkpointing_enable()
    assert theirs.model.activation_checkpointing
    theirs.gradient_checkpointing_disable()
    assert not theirs.model.activation_checkpointing
    with pytest.raises(ValueError, match="every slot or none"):
        theirs._set_gradient_checkpointing(True, every_n_layers=2)


def test_the_config_says_what_transformers_asks(tmp_path):
    plait.save(tiny("DF AF"), tmp_path, TOKENIZER)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, PlaitConfig)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (257, 64, 4)
    config.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["design"] == config.design
    assert AutoConfig.from_pretrained(tmp_path / "again").model_config == config.model_config


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: PlaitConfig(), "PlaitConfig needs design"),
        (lambda model: PlaitConfig(design={"vocab": 9, "dim": 64, "patern": "A"}), "did you mean 'pattern'"),
        (lambda model: model(torch.ones(1, 2, dtype=torch.long), output_attentions=True), "not supported"),
        (lambda model: model(inputs_embeds=torch.ones(1, 2, 64)), "inputs_embeds is not supported"),
        (lambda model: model(torch.ones(1, 2, dtype=torch.long), torch.ones(1, 1, 2, 2)), "shape \\(batch, time\\)"),
        (lambda model: model.resize_token_embeddings(300), "designed for a vocabulary of 257, not 300"),
    ],
)
def test_what_is_not_supported_is_refused(call, message, tmp_path):
    theirs = reload(tiny(dtype=torch.float32), tmp_path)
    with pytest.raises(ValueError, match=message):
        call(theirs)
    assert theirs.resize_token_embeddings() is theirs.model.embed


WITHOUT_LETTER = sorted(set(KINDS) - {layer.to_dict()["kind"] for layer in LETTERS.values()})
ADAPTED = {
    **{letter: (f"{letter}F", {}) for letter in LETTERS},
    **{kind: ("QF", {"Q": kind}) for kind in WITHOUT_LETTER},
    "heads of a projection": ("QF", {"Q": plait.GRU(heads=2, head_dim=32, projection="heads")}),
    "queries from a latent": ("QF", {"Q": plait.LatentAttention(query_rank=20)}),
    "shared": ("QFQ", {"Q": plait.Attention(shared=True)}),
    "merged by projection": ("[M|A]:projection F", {}),
    "merged by attention": ("[D|A]:merge_attention F", {}),
}


# how much of the first layer's values RWKV-7's layers take in: in the first layer, these are its own
IDLE = {"Rw": ["slots.0.mixer.v_down", "slots.0.mixer.v_up"]}


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_act_merge_and_load(name, tmp_path):
    """LoRA on every projection changes the logits, gets gradients, is equal once merged, and the merged folder is plait's."""
    peft, (pattern, layers), idle = pytest.importorskip("peft"), ADAPTED[name], IDLE.get(name, [])
    design = plait.ModelConfig(vocab=61, dim=64, pattern=pattern, layers=layers, tie_embeddings=False)
    model, tokens = PlaitForCausalLM(PlaitConfig(design=design)).eval(), torch.arange(20)[None]
    names = [*plait.hub.lora_targets(design), "lm_head"]
    assert names == [name for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)]
    before = model(input_ids=tokens).logits.detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names, task_type="CAUSAL_LM")).eval()
    added = {name: p for name, p in adapted.named_parameters() if "lora_B" in name}
    for name, parameter in added.items():
        parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    out = adapted(input_ids=tokens, labels=tokens)
    out.loss.backward()
    still = [name.partition(".lora_B")[0] for name, p in added.items() if not p.grad.abs().sum() > 0]
    assert len(added) == len(names) and [name.rpartition("model.")[2] for name in still] == idle
    assert (out.logits - before).abs().max() > 0.1
    with torch.no_grad():
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=tokens).logits, out.logits, rtol=1e-3, atol=1e-3)  # float32
        merged.save_pretrained(tmp_path)
        assert torch.equal(plait.load(tmp_path)(tokens)[0], merged(input_ids=tokens).logits)
