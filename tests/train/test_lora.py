"""Low-rank additions: trained alone, resumed to the bit, PEFT's to the name, and one with the model once merged."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import plait
import plait.hub  # noqa: F401 (registers the classes)
from plait.data import ByteTokenizer, load_tokenizer
from plait.design.lora import LoRA, adapted_modules
from plait.model.lora import additions
from plait.train import Interrupted, RunConfig, load_run, train
from tests.engine.conftest import CHATML, letters

TOKENS = torch.arange(40)[None] % 256
MERGED = 2e-5  # of the largest logit, float32: (W + BA) x beside W x + B A x; machines sum these in orders of their own


def logits(model):
    with torch.no_grad():
        return model(TOKENS)[0] if isinstance(model, plait.LanguageModel) else model(input_ids=TOKENS).logits


def alike(got, expected):
    assert (got - expected).abs().max() <= MERGED * expected.abs().max()


@pytest.fixture
def base(tmp_path):
    """A small model that has learned nothing, with its tokenizer."""
    model = plait.build(
        plait.ModelConfig(vocab=257, dim=64, pattern="DF [M|A]:projection F", tie_embeddings=False), seed=5
    )
    plait.save(model, tmp_path / "base", ByteTokenizer())
    return tmp_path / "base"


@pytest.fixture
def questions(tmp_path):
    """Prompts and completions."""
    path = tmp_path / "questions.jsonl"
    words = ["sea", "gate", "norm", "delta", "state", "decay"]
    pairs = [{"prompt": f"the {a} of ", "completion": f"{b}."} for a in words for b in words]
    path.write_text("\n".join(map(json.dumps, pairs)))
    return path


@pytest.fixture
def tuned(make_run, base, questions, quiet):
    """A run of six steps; keyword arguments change it."""

    def make(**changes):
        data = {"source": str(questions), "length": 32, "heldout": 0.2, "cache": str(base.parent / "cache")}
        fields = {"design": None, "data": data, "start": str(base), "steps": 6, "lr": 1e-2, "save_every": 3, "batch": 3}
        return make_run(**(fields | {"lora": {"rank": 2, "dropout": 0.2}} | changes))

    return make


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon", "accumulate": 3, "activation_checkpointing": True}])
def test_six_steps_are_three_and_three_more(tuned, quiet, interrupt_once, changes):
    whole = train(
        tuned(folder="whole", sample_every=3, **changes), sample=lambda *_: f"{torch.rand(1).item()}", console=quiet
    )
    run = tuned(folder="parts", sample_every=3, **changes)
    with pytest.raises(Interrupted, match="step 3"):
        train(run, sample=interrupt_once(), console=quiet)
    parts = train(run, sample=lambda *_: f"{torch.rand(1).item()}", console=quiet)
    assert parts.done == 3
    for one, other in zip(additions(whole.model).values(), additions(parts.model).values(), strict=True):
        assert torch.equal(one, other)
    assert whole.heldout.loss == parts.heldout.loss
    losses = [[record["loss"] for record in result.history if "loss" in record] for result in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_a_run_is_its_base_and_additions_wherever_it_is_loaded(tuned, base, quiet, tmp_path):
    result = train(tuned(lora={"rank": 2, "alpha": 3.0, "targets": ["A", "F#0", "in_proj", "lm_head"]}), console=quiet)
    expected = logits(result.model)
    assert (expected - logits(plait.load(base))).abs().max() > 0.1
    assert result.model.training is False
    own = load_file(result.checkpoint / "adapter_model.safetensors")
    assert len(own) == 2 * len(adapted_modules(result.model.design, result.model.lora))
    assert not (result.checkpoint / "model.safetensors").exists()
    tensors = load_file(result.checkpoint / "training.safetensors")
    assert all("lora_" in name for name in tensors if name.startswith("optimizer."))
    theirs = peft.PeftModel.from_pretrained(plait.hub.PlaitForCausalLM.from_pretrained(base), result.checkpoint)
    alike(logits(theirs), expected)
    loaded = plait.load(result.folder)
    alike(logits(loaded), expected)
    for name, model in {"result": result.model, "loaded": loaded}.items():
        plait.save(model, tmp_path / name)
        alike(logits(plait.load(tmp_path / name)), expected)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        alike(logits(again), expected)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    on_top = train(tuned(folder="top", start=str(result.folder), steps=1), console=quiet)
    assert on_top.model.base[0] == str(result.checkpoint.resolve())


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_model_of_transformers_is_tuned_and_goes_back(tuned, quiet, tmp_path, lora):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=257, num_hidden_layers=2, eos_token_id=256, bos_token_id=None, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    ByteTokenizer().save(tmp_path / "llama")
    result = train(tuned(start=str(tmp_path / "llama"), lora=lora), console=quiet)
    for name, model in {"result": result.model, "loaded": plait.load(result.folder)}.items():
        assert plait.export(model, tmp_path / name) == "llama"
        theirs = LlamaForCausalLM.from_pretrained(tmp_path / name)
        alike(logits(theirs), logits(result.model))
    assert (logits(result.model) - logits(plait.load(tmp_path / "llama"))).abs().max() > 0.05


def test_another_base_is_refused(tuned, base, quiet, tmp_path):
    result = train(tuned(), console=quiet)
    shutil.copytree(base, tmp_path / "moved")
    other = plait.build(plait.load(base).design, seed=6)
    plait.save(other, base, ByteTokenizer())
    with pytest.raises(ValueError, match="not the weights that the additions in .*step-000006 were trained on"):
        plait.load(result.folder)
    with pytest.raises(ValueError, match="were trained on, or they have changed since"):
        train(tuned(steps=9, resume=True), console=quiet)
    shutil.rmtree(base)
    with pytest.raises(FileNotFoundError, match="base: not there, and .*say in adapter_config.json where it is"):
        plait.load(result.folder)
    config = result.checkpoint / "adapter_config.json"
    said = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "moved")}
    config.write_text(json.dumps(said))
    alike(logits(plait.load(result.folder)), logits(result.model))
    config.write_text(json.dumps(said | {"use_dora": True}))
    with pytest.raises(ValueError, match="use_dora is True; plait reads LoRA with use_dora False alone"):
        plait.load(result.folder)


def test_only_answers_are_learned_and_measured(tuned, quiet, questions):
    result = train(tuned(lora=None, optimizer="muon"), console=quiet)
    tokenizer, total, count = ByteTokenizer(), 0.0, 0
    from plait.train.inputs import open_shards

    shards = open_shards(tuned().data, tokenizer)
    held = {
        bytes(shards.tokens()[a : b - 1].astype("uint8")) for a, b in zip(*shards.documents("heldout"), strict=True)
    }
    for line in questions.read_text().splitlines():
        prompt, completion = json.loads(line).values()
        if f"{prompt}{completion}".encode() in held:
            ids = torch.tensor([[*tokenizer.encode(prompt + completion), tokenizer.eos]])
            with torch.no_grad():
                logp = result.model(ids)[0].log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            answer = logp[len(prompt) - 1 :]
            total, count = total - answer.sum().item(), count + len(answer)
    assert result.heldout.tokens == count
    assert result.heldout.loss == pytest.approx(total / count, rel=1e-5)


def test_a_chat_model_stays_one(make_run, quiet, tmp_path):
    """Tokenizer, template and the ends of turns are those of the folder that it starts from."""
    inner = letters()
    inner.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    (tmp_path / "tokens").mkdir()
    inner.save(str(tmp_path / "tokens" / "tokenizer.json"))
    (tmp_path / "tokens" / "chat_template.jinja").write_text(CHATML)
    tokenizer = load_tokenizer(tmp_path / "tokens")
    plait.save(
        plait.build(plait.ModelConfig(vocab=tokenizer.vocab, dim=64, pattern="DF")), tmp_path / "base", tokenizer
    )
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes."}]
    (tmp_path / "talks.jsonl").write_text("\n".join([json.dumps({"messages": talk})] * 9))
    data = {"source": str(tmp_path / "talks.jsonl"), "length": 64, "cache": str(tmp_path / "cache")}
    fields = {"design": None, "data": data, "start": str(tmp_path / "base"), "lora": {"rank": 4, "seed": 3}}
    result = train(make_run(steps=60, lr=3e-2, eval_every=0, save_every=0, optimizer="muon", **fields), console=quiet)
    again = load_tokenizer(result.checkpoint)
    assert again.chat_template.text == CHATML and again.ends == tokenizer.ends
    assert json.loads((result.checkpoint / "generation_config.json").read_text())["eos_token_id"] == list(
        tokenizer.ends
    )
    assert plait.generate(plait.load(result.folder), again, "hello", chat=True, max_tokens=20) == "yes."


BRANCHES = ["slots.2.mixer.branches.0.layers.0.", "slots.2.mixer.branches.1.layers.0."]


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["down_proj"], ["slots.1.mixer.down_proj", "slots.3.mixer.down_proj"]),
        (["F#1"], ["slots.3.mixer.up_proj", "slots.3.mixer.down_proj"]),
        (["M", "qkv_proj"], [f"{BRANCHES[0]}in_proj", f"{BRANCHES[0]}out_proj", f"{BRANCHES[1]}qkv_proj"]),
        (["slots.2.mixer.merge.out_proj", "lm_head"], ["slots.2.mixer.merge.out_proj", "lm_head"]),
    ],
)
def test_targets_are_names_letters_or_addresses(base, targets, names):
    design = plait.load(base).design
    assert adapted_modules(design, LoRA(targets=tuple(targets))) == names
    assert adapted_modules(design, LoRA()) == plait.hub.lora_targets(design)


def test_a_design_without_projections_of_its_own_is_refused():
    design = plait.ModelConfig(vocab=61, dim=64, pattern="E", tie_embeddings=False)
    with pytest.raises(ValueError, match="no projection to add to.*targets: .lm_head.* adds to its head"):
        adapted_modules(design, LoRA())
    with pytest.raises(
        ValueError, match="no projection to add to; experts have none, nor shared layers with adapter_rank$"
    ):
        adapted_modules(design.replace(tie_embeddings=True), LoRA())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"rang": 4}}, "lora: unknown key 'rang'; did you mean 'rank'"),
        ({"lora": {"rank": 0}}, "LoRA.rank must be above 0, got 0"),
        ({"lora": {"dropout": 1.0}}, "LoRA.dropout must be at least 0 and below 1, got 1.0"),
        ({"lora": {"rank": "x"}}, "lora.rank: expected a whole number, got 'x'"),
        ({"lora": 16}, "lora: expected a mapping, got 16"),
        (
            {"lora": {}, "start": None, "design": "AF"},
            "lora adds to a model that exists: give its folder, start=FOLDER",
        ),
    ],
)
def test_a_wrong_setting_is_said_in_one_line(tuned, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        tuned(**changes)
    assert "\n" not in str(caught.value)


def test_what_cannot_begin_is_said_before_it_does(tuned, base, quiet):
    with pytest.raises(
        ValueError, match="lora.targets: there is no projection 'down_prj' to adapt; did you mean 'down_proj'"
    ):
        train(tuned(lora={"targets": ["down_prj"]}), console=quiet)
    train(tuned(), console=quiet)
    with pytest.raises(ValueError, match="belongs to a run with lora.rank 2, not 4.*give another folder$"):
        train(tuned(lora={"rank": 4}, resume=True), console=quiet)
    assert RunConfig.from_dict(tuned().to_dict()) == tuned()


def test_a_run_goes_on_from_another_folder(tuned, base, quiet, tmp_path, monkeypatch):
    """Its weights below are named as they were given, and where that leads nowhere, by where they lay."""
    monkeypatch.chdir(base.parent)
    run = tuned(start=base.name, steps=2)
    train(run, console=quiet)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train(load_run(run.folder, steps=3, resume=True), console=quiet).done == 1


def test_rates_name_what_lora_adds_to(tuned, quiet):
    lora = {"rank": 2, "targets": ["A", "lm_head"]}
    with pytest.raises(ValueError, match=r"rates\.D: lora adds nothing there.*; it adds to A, lm_head$"):
        train(tuned(lora=lora, rates={"A": 1, "D": 2}), console=quiet)
    with pytest.raises(ValueError, match=r"rates\.embed\.weight: lora adds nothing there"):
        train(tuned(lora=lora, rates={"embed.weight": 2}), console=quiet)
    assert train(tuned(lora=lora, rates={"*": 2, "A": 1, "lm_head*": 3}), console=quiet).step == 6
