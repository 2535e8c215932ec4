"""A saved folder in transformers, by itself: which code reads it, how a text becomes ids, which ids may come out."""

import json
import logging
import os
import subprocess
import sys

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import plait
from plait.data import ByteTokenizer
from plait.hub import PlaitConfig, PlaitForCausalLM

TEXTS = ["", "never odd or even", "  two spaces", "Ünïcödé …"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def around(kind):
    """What puts tokens around a text."""
    first, last = ("[GO]", 0), ("[STOP]", 1)
    template = processors.TemplateProcessing(single="[GO] $A [STOP]", special_tokens=[first, last])
    return {
        "template": template,
        "after byte level": processors.Sequence([processors.ByteLevel(trim_offsets=False), template]),
        "bert": processors.BertProcessing(last, first),
        "roberta": processors.RobertaProcessing(last, first),
    }[kind]


def written(folder, processor, **config):
    """A folder with a byte-level tokenizer."""
    names = ["[GO]", "[STOP]", *ALPHABET]
    inner = tokenizers.Tokenizer(models.BPE({name: id for id, name in enumerate(names)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(names[:2])
    inner.post_processor = processor
    folder.mkdir()
    inner.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "[GO]", "eos_token": "[STOP]"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return plait.load_tokenizer(folder)


def saved(folder, tokenizer, vocab=None, pattern="AF"):
    design = plait.ModelConfig(vocab=vocab or tokenizer.vocab, dim=64, pattern=pattern)
    plait.save(plait.build(design, seed=4), folder, tokenizer)
    return folder


@pytest.mark.parametrize("config", [{}, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}])
@pytest.mark.parametrize("kind", ["template", "after byte level", "bert", "roberta"])
def test_a_text_becomes_the_ids_that_training_saw(kind, config, tmp_path):
    tokenizer = written(tmp_path / "given", around(kind), **config)
    reader = AutoTokenizer.from_pretrained(saved(tmp_path / "model", tokenizer))
    assert [reader(text)["input_ids"] for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert [reader.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS
    again = plait.load_tokenizer(tmp_path / "model")
    assert again.hash == tokenizer.hash
    assert again.eos == 1


def test_special_tokens_that_the_vocabulary_lacks_are_not_made_up(tmp_path):
    config = {"pad_token": "[PAD]", "unk_token": "[UNK]", "additional_special_tokens": ["[A]", "[GO]"]}
    tokenizer = written(tmp_path / "given", None, **config)
    reader = AutoTokenizer.from_pretrained(saved(tmp_path / "model", tokenizer))
    assert len(reader) == tokenizer.vocab
    assert (reader.pad_token_id, reader.eos_token_id, reader.bos_token_id) == (1, 1, None)


def test_a_chat_that_begins_with_bos_keeps_it(tmp_path):
    tokenizer = written(tmp_path / "given", around("bert"), chat_template="{{ bos_token }}{{ messages[0].content }}")
    reader = AutoTokenizer.from_pretrained(saved(tmp_path / "model", tokenizer))
    assert reader.apply_chat_template([{"content": "hi"}], tokenize=False) == "[GO]hi"


@pytest.mark.parametrize("options", [{"do_sample": True, "temperature": 5.0}, {"num_beams": 3, "do_sample": False}])
def test_ids_beyond_the_tokenizers_never_come_out(options, tmp_path):
    model = plait.build(plait.ModelConfig(vocab=640, dim=64, pattern="DF", tie_embeddings=False))
    with torch.no_grad():
        model.lm_head.weight[:257] *= 0.01  # the likeliest are those that mean nothing
    plait.save(model, tmp_path / "a", ByteTokenizer())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b")
    ids = torch.tensor([list(b"ab")])
    torch.manual_seed(0)
    for model in (theirs, AutoModelForCausalLM.from_pretrained(tmp_path / "b")):
        output = model.generate(ids, max_new_tokens=30, eos_token_id=None, **options)
        assert output.shape == (1, 32)
        assert output.max() < 257


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the tokenizer has 257 ids, but the model was built for 200"):
        saved(tmp_path / "model", ByteTokenizer(), vocab=200)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("tokenizer", ["bytes", "given"])
def test_pipelines_pad_batches(tokenizer, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = ByteTokenizer() if tokenizer == "bytes" else written(tmp_path / "given", around("bert"))
    folder = saved(tmp_path / "model", tokenizer, pattern="DF AF")
    prompts = ["to be", "or not to be, that", "is"]
    found = pipeline("text-generation", model=str(folder), device="cpu")(
        prompts, batch_size=3, max_new_tokens=6, do_sample=False, return_full_text=False
    )
    assert [row[0]["generated_text"] for row in found] == plait.generate(
        plait.load(folder), tokenizer, prompts, max_tokens=6
    )
    assert "not supported" not in caplog.text


def test_a_loaded_model_keeps_its_tokenizer(tmp_path):
    tokenizer = written(tmp_path / "given", around("template"), chat_template="{{ messages[0].content }}")
    saved(tmp_path / "a", tokenizer, vocab=300)
    model = plait.load(tmp_path / "a")
    for file in (tmp_path / "a").iterdir():
        file.unlink()  # nothing is read later
    plait.save(model, tmp_path / "b")
    assert plait.load_tokenizer(tmp_path / "b").hash == tokenizer.hash
    assert AutoTokenizer.from_pretrained(tmp_path / "b").chat_template
    ends = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert (ends["eos_token_id"], ends["suppress_tokens"][-1]) == (1, 299)


def test_folders_are_read_without_an_import_or_say_how(tmp_path):
    """In a process of its own, where nothing of plait is imported: as lm-eval's `--model hf` does it."""
    ours = saved(tmp_path / "ours", ByteTokenizer(), pattern="DF AF")
    AutoModelForCausalLM.from_pretrained(ours).save_pretrained(tmp_path / "theirs")
    script = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
ids = torch.arange(5)[None]
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("read without a word")
ours, theirs = [AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True) for path in sys.argv[1:3]]
assert torch.equal(ours(ids).logits, theirs(ids).logits)
ours.save_pretrained(sys.argv[3])
again = AutoModelForCausalLM.from_pretrained(sys.argv[3], trust_remote_code=True)
assert torch.equal(ours(ids).logits, again(ids).logits)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as table
assert AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True).model_type in table
"""
    folders = [str(ours), str(tmp_path / "theirs"), str(tmp_path / "again")]
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache")}  # where transformers copies the code to
    run = subprocess.run(
        [sys.executable, "-c", script, *folders],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_plait.py",
    ]


def test_a_config_alone_is_saved_with_its_code(tmp_path):
    PlaitConfig(design=plait.ModelConfig(vocab=9, dim=64, pattern="AF")).save_pretrained(tmp_path)
    assert (tmp_path / "modeling_plait.py").is_file()
    assert isinstance(AutoModelForCausalLM.from_config(PlaitConfig.from_pretrained(tmp_path)), PlaitForCausalLM)
