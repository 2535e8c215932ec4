"""Models as folders: what is written, and every way in which a folder can be wrong."""

import json

import pytest
import safetensors.torch
import torch

import plait
from plait.model import model_folder, weight_files
from plait.opening import folder_design

DESIGN = plait.ModelConfig(vocab=31, dim=64, pattern="M [A|D]", layers={"M": plait.Mamba2(shared=True)})


@pytest.fixture
def folder(tmp_path):
    plait.save(plait.build(DESIGN), tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_what_is_written(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "modeling_plait.py"]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "plait"
    assert config["architectures"] == ["PlaitForCausalLM"]
    assert plait.ModelConfig.from_dict(config["design"]) == DESIGN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_survive(tmp_path, dtype):
    model = plait.build(DESIGN, dtype=dtype)
    plait.save(model, tmp_path)
    loaded = plait.load(tmp_path)
    assert loaded.dtype == dtype
    for name, x in model.named_parameters():
        assert loaded.get_parameter(name).dtype == x.dtype
        assert torch.equal(loaded.get_parameter(name), x)
    assert plait.load(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_saving_over_an_older_model(folder):
    other = plait.build(DESIGN, seed=9)
    plait.save(other, folder)
    assert torch.equal(plait.load(folder).embed.weight, other.embed.weight)


def test_the_newest_checkpoint_of_a_run(tmp_path):
    for step in (10, 200):
        plait.save(plait.build(DESIGN, seed=step), tmp_path / f"checkpoints/step-{step:08d}")
    (tmp_path / "checkpoints/step-00000300").mkdir()  # cut short before its config
    assert model_folder(tmp_path).name == "step-00000200"
    assert torch.equal(plait.load(tmp_path).embed.weight, plait.build(DESIGN, seed=200).embed.weight)


def test_a_full_disk_leaves_the_old_model(folder, monkeypatch):
    old = plait.load(folder).embed.weight

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_files, "_write_file", full)
    with pytest.raises(OSError, match="No space left"):
        plait.save(plait.build(DESIGN, seed=9), folder)
    assert torch.equal(plait.load(folder).embed.weight, old)
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: rewrite(f, lambda t: t.pop("norm.weight")),
            r"missing tensors \['norm.weight'\], unused tensors \[\]",
        ),
        (lambda f: rewrite(f, lambda t: t.update(extra=torch.zeros(1))), r"unused tensors \['extra'\]"),
        (
            lambda f: rewrite(f, lambda t: t.update({"norm.weight": torch.zeros(3)})),
            r"norm.weight has shape \(3,\), expected \(64,\)",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 100), "corrupt or cut short"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "corrupt or cut short"),
        (lambda f: edit(f, model_type="llama"), "plait does not know 'design'"),
        (lambda f: edit(f, design=None), "'design' is missing"),
        (lambda f: edit(f, design={"vocab": 31, "dim": 64, "patern": "M"}), "did you mean 'pattern'"),
        (lambda f: edit(f, design=DESIGN.replace(vocab=32).to_dict()), "weights of design"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    ],
)
def test_damage(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        plait.load(folder)
    assert "\n" not in str(caught.value)


def test_a_dtype_that_is_none(folder):
    with pytest.raises(ValueError, match="dtype must be one of torch.float64, .*; got 'bfloat16'"):
        plait.load(folder, dtype="bfloat16")


@pytest.mark.parametrize("device", ["tpu", "cdua:0", None, torch.device("cuda:99"), "hpu", "vulkan"])
def test_a_device_that_is_none(folder, device):
    for make in (lambda: plait.load(folder, device=device), lambda: plait.build(DESIGN, device=device)):
        with pytest.raises(
            ValueError, match=f"^device '{device}': .*expected auto, cpu, cuda or cuda:INDEX$"
        ) as caught:
            make()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("tokenizer", ["bytes", {"vocab": 257}])
def test_a_tokenizer_that_is_none(tmp_path, tokenizer):
    with pytest.raises(TypeError, match="expected a tokenizer that plait.load_tokenizer gave, got (str|dict)$"):
        plait.save(plait.build(DESIGN), tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


def test_what_is_not_there(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        plait.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds neither config\.json nor checkpoints"):
        plait.load(tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="a config without weights"):
        plait.load(folder)


def test_config_with_a_missing_or_wrong_dtype(folder):
    edit(folder, dtype="float31")
    with pytest.raises(ValueError, match="dtype 'float31'"):
        plait.load(folder)
    edit(folder, dtype=None)
    with pytest.raises(ValueError, match="dtype"):
        plait.load(folder)


def test_a_design_that_another_version_wrote_is_named_with_its_file(tmp_path):
    plait.save(plait.build(plait.ModelConfig(vocab=257, dim=64, pattern="AF")), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"dim"', '"dmi"'), encoding="utf-8")
    for read in (plait.load, folder_design):
        with pytest.raises(ValueError, match=rf"^{config}: design: unknown key 'dmi'; did you mean 'dim'"):
            read(tmp_path)
