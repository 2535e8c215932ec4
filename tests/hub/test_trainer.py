"""transformers' Trainer, and the wrappers that people train in."""

import runpy
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from transformers import Trainer, TrainingArguments

import plait
import plait.hub
from plait.hub import PlaitForCausalLM

EXAMPLE = Path(__file__).parents[2] / "examples" / "trainer.py"
pytestmark = [
    # renamed within transformers 5
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


class Own(PlaitForCausalLM):
    """A subclass of somebody's own."""


def arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder), max_steps=2, save_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, **options
    )


def rows(count=4, length=9, vocab=41):
    made = torch.randint(vocab, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": list(row)} for row in made]


def lora(model, **options):
    return peft.LoraConfig(target_modules=plait.hub.lora_targets(model.config.model_config), **options)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("kind", [PlaitForCausalLM, Own])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_smoothed_labels_are_shifted(hub, kind, adapted, compiled, tmp_path):
    model, smooth = hub(kind=kind), 0.3
    logp = model(ids := torch.tensor([[5, 6, 7, 40, 8]])).logits.log_softmax(-1)[0, :-1]
    want = -(1 - smooth) * logp.gather(-1, ids[0, 1:, None]).mean() - smooth * logp.mean()
    if adapted:  # a fresh adapter changes nothing
        model = peft.get_peft_model(model, lora(model, task_type="CAUSAL_LM"))
    options = arguments(tmp_path, label_smoothing_factor=smooth, torch_compile=compiled)
    trainer = Trainer(model=model, args=options)
    with torch.compiler.set_stance("force_eager"):  # wrapped for the compiler, which need not run
        prepared = trainer.accelerator.prepare_model(model)
        assert (prepared is not model) == compiled
        torch.testing.assert_close(trainer.compute_loss(prepared, {"input_ids": ids, "labels": ids.clone()}), want)


def test_the_example_learns_and_goes_on(tmp_path):
    assert runpy.run_path(str(EXAMPLE))["main"](tmp_path).startswith(("rose and", "set and"))
    assert (tmp_path / "run" / "checkpoint-60").is_dir()
    assert plait.load(tmp_path / "trained").tokenizer_files


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at it
def test_a_model_that_the_trainer_compiles_is_saved_under_its_own_names(hub, tmp_path):
    model = hub(dtype=torch.float32)
    options = arguments(tmp_path, torch_compile=True, torch_compile_backend="eager")
    trainer = Trainer(model=model, args=options, train_dataset=rows())
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    for folder in ("out", "checkpoint-2"):
        assert same(plait.load(tmp_path / folder), model.model)


@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.compile(torch.nn.DataParallel(model), backend="eager"),
    ],
    ids=["DataParallel", "compiled", "both"],
)
def test_a_wrapped_models_tensors_are_saved_under_its_own_names(hub, wrap, tmp_path):
    model = hub(dtype=torch.float32)
    model.save_pretrained(tmp_path, state_dict=wrap(model).state_dict())
    assert same(plait.load(tmp_path), model.model)


def test_adapters_are_saved_by_their_own_names_and_merged_ones_are_a_model(hub, tmp_path):
    model, other = hub(dtype=torch.float32), hub(dtype=torch.float32)
    model.add_adapter(lora(model, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    names = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert names
    assert all("lora_" in name for name in names)
    other.load_adapter(str(tmp_path / "adapter"))
    assert same(model, other)
    wrapped = peft.get_peft_model(hub(dtype=torch.float32), lora(model, init_lora_weights=False))
    ids = torch.arange(6)[None]
    want = wrapped(ids).logits
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(plait.load(tmp_path / "merged")(ids)[0], want)
