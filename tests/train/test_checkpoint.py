"""A full disk and damaged files: one line, and what was good stays."""

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import plait
from plait.hub import PlaitForCausalLM
from plait.run_folder import remove_leftovers
from plait.train import SaveFailed, checkpoints, latest, train


@pytest.fixture
def trained(make_run, quiet) -> Path:
    """A run with checkpoints at steps 2 and 4."""
    run = make_run("DF", steps=4, save_every=2, eval_every=0)
    train(run, console=quiet)
    return Path(run.folder)


def test_a_checkpoint_is_a_saved_model_with_its_tokenizer(trained):
    checkpoint = latest(trained)
    names = {path.name for path in checkpoint.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "training.safetensors", "training.json"} <= names
    model = plait.load(checkpoint)
    assert plait.load_tokenizer(checkpoint).decode([104, 105]) == "hi"
    weights = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())


def test_a_run_folder_loads_as_its_newest_checkpoint(trained):
    newest, found = plait.load(latest(trained)), plait.load(trained)
    assert all(torch.equal(a, b) for a, b in zip(newest.parameters(), found.parameters(), strict=True))
    assert plait.load_tokenizer(trained).vocab == 257


def test_keep_last(make_run, quiet):
    run = make_run(steps=10, save_every=2, keep_last=3, eval_every=0)
    train(run, console=quiet)
    names = [path.name for path in checkpoints(Path(run.folder))]
    assert names == ["step-000006", "step-000008", "step-000010"]


def test_the_newest_is_found_by_number_and_leftovers_are_removed(tmp_path):
    parent = tmp_path / "checkpoints"
    for name in ("step-999999", "step-1000000", ".step-1000002.tmp", ".step-000001.old", "notes"):
        (parent / name).mkdir(parents=True)
    assert latest(tmp_path).name == "step-1000000"
    remove_leftovers(tmp_path)
    assert {path.name for path in parent.iterdir()} == {"step-999999", "step-1000000", "notes"}


@pytest.mark.parametrize("call", [0, 1, 4, 7])
def test_a_full_disk_leaves_the_checkpoint_before(make_run, quiet, monkeypatch, call):
    run = make_run("DF", steps=4, save_every=2, eval_every=0)
    real, seen = os.fsync, []

    def full(descriptor: int) -> None:
        if (Path(run.folder) / "checkpoints" / "step-000002").exists():
            seen.append(descriptor)
            if len(seen) > call + 2:  # two more finish the save of step 2
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveFailed, match="step 4 could not be saved .*No space left") as caught:
        train(run, console=quiet)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(f"the last good checkpoint is {caught.value.checkpoint}")
    assert [path.name for path in (Path(run.folder) / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.undo()
    assert train(run, console=quiet).step == 4


def test_a_file_that_may_not_grow_leaves_the_checkpoint_before(make_run, quiet):
    """A real failure of write(2), in the middle of the weights: a limit on the size of files."""
    run = make_run("DF", steps=4, save_every=2, eval_every=0, sample_every=3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def shrink(model, tokenizer, prompt: str) -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        return ""

    try:
        with pytest.raises(SaveFailed, match="step 4 could not be saved"):
            train(run, sample=shrink, console=quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (Path(run.folder) / "checkpoints").iterdir()] == ["step-000002"]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "config.json", "training.json"])
def test_damage_is_one_line_that_names_the_file_and_what_is_good(make_run, quiet, trained, name, damage):
    older, newer = checkpoints(trained)
    damage(newer / name)
    if (name, damage) == ("training.json", flip):
        (newer / name).write_text("{}")  # a flipped bit in text may mean another text; this says too little
    run = make_run("DF", steps=4, save_every=2, eval_every=0)
    with pytest.raises(ValueError, match="damaged|missing") as caught:
        train(run, console=quiet)
    assert str(newer / name) in str(caught.value)
    assert f"remove {newer} to go on from {older}" in str(caught.value)
    assert "\n" not in str(caught.value)
    shutil.rmtree(newer)
    assert train(run, console=quiet).step == 4


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_is_not_taken_from_a_damaged_checkpoint(trained, name, damage):
    older, newer = checkpoints(trained)
    damage(newer / name)
    for load, folder in ((plait.load, trained), (plait.load, newer), (PlaitForCausalLM.from_pretrained, newer)):
        with pytest.raises(ValueError, match=f"{name} is (damaged|missing)") as caught:
            load(folder)
        assert str(caught.value).endswith(f"the newest whole checkpoint is {older}")
    damage(older / name)
    with pytest.raises(ValueError, match="there is no other whole one"):
        plait.load(trained)


def test_a_model_needs_no_optimizer_and_no_checkpoint(trained, tmp_path):
    newest = latest(trained)
    flip(newest / "training.safetensors")
    (newest / "generation_config.json").write_text("{}")
    plait.load(newest)
    shutil.copytree(newest, tmp_path / "copy")
    plait.load(tmp_path / "copy")
    flip(tmp_path / "copy" / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors is damaged.*no other whole one"):
        plait.load(tmp_path / "copy")


def test_all_files_of_a_checkpoint_have_one_mode(trained):
    assert len({path.stat().st_mode for path in latest(trained).iterdir()}) == 1


def test_damage_everywhere_says_that_nothing_is_good(make_run, quiet, trained):
    for checkpoint in checkpoints(trained):
        flip(checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match="no earlier checkpoint is whole"):
        train(make_run("DF", steps=4, save_every=2, eval_every=0), console=quiet)
