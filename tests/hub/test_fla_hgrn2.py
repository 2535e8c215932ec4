"""The bounds of HGRN-2's layers, one tensor in flash-linear-attention's folders: read exactly, and the same ones written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import plait
from plait.hub.checkpoint import design_of, export, read
from plait.hub.families import family
from plait.hub.families.fla_hgrn2 import DEFAULTS
from plait.hub.parity import formula

DIM, LAYERS = 16, 5
CONFIG: dict[str, Any] = {
    **{"model_type": "hgrn2", "hidden_size": DIM, "num_heads": 2, "expand_ratio": 8, "num_hidden_layers": LAYERS},
    **{"vocab_size": 11, "intermediate_size": 24},
}
SHARED = "model.lower_bounds"
SPREADS = [0.0, 1.0, 30.0, 300.0]  # bounds from i / layers, as untrained, to within e^-300 of 0 and 1


def spread(width: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return (formula(SHARED, (LAYERS, DIM)) * width).to(dtype)


def folder(path: Path, bounds: Tensor, dtype: torch.dtype = torch.float32) -> Path:
    """One that they would have written, with these bounds."""
    model = plait.build(read_design(), seed=1).to(dtype)
    with torch.no_grad():
        for i, layer in enumerate(mixers(model)[1:]):
            layer.bound.fill_(float(i))
    export(model, path, to="hgrn2")
    tensors = load_file(path / "model.safetensors")
    assert tensors[SHARED].shape == (LAYERS, DIM)
    save_file(tensors | {SHARED: bounds.to(dtype)}, path / "model.safetensors", {"format": "pt"})
    return path


def read_design(**changes: Any) -> plait.ModelConfig:
    return design_of(family("hgrn2"), {**DEFAULTS, **CONFIG, **changes}, "config.json")


def mixers(model: plait.LanguageModel) -> list[Any]:
    return [module for module in model.modules() if isinstance(getattr(module, "config", None), plait.HGRN2)]


def theirs(tensor: Tensor) -> Tensor:
    """The log-odds of layers 1 on: the bounds, and what they leave of 1, each a sum of its own shares in float64."""
    shares = (tensor.double() - tensor.double().amax(0)).exp()
    return torch.stack(
        [shares[1 : i + 1].sum(0).log() - (shares[0] + shares[i + 1 :].sum(0)).log() for i in range(1, LAYERS)]
    )


def ours(model: plait.LanguageModel) -> Tensor:
    first, *rest = mixers(model)
    assert first.bound is None and first.config.lower_bound == 0.0
    return torch.stack([layer.bound.detach() for layer in rest])


def assert_same(found: Tensor, expected: Tensor) -> None:
    """In log-odds, to float32's last digits."""
    torch.testing.assert_close(found.double(), expected.double(), rtol=2.0**-22, atol=2.0**-23)


@pytest.mark.parametrize("width", SPREADS)
def test_bounds_are_read_and_go_back(width: float, tmp_path: Path) -> None:
    tensor = spread(width)
    model = read(folder(tmp_path, tensor))
    assert_same(ours(model), theirs(tensor))
    export(model, tmp_path / "back")
    written = load_file(tmp_path / "back" / "model.safetensors")[SHARED]
    assert written.dtype == tensor.dtype and written.isfinite().all()
    assert_same(theirs(written), theirs(tensor))
    assert written.double().mean(0).abs().max() <= 1e-6 * max(1.0, width)  # the number that a softmax does not see


def test_bounds_that_grow_by_less_than_float32_sees(tmp_path: Path) -> None:
    tensor = torch.zeros(LAYERS, DIM)
    tensor[2:4] = -40.0
    model = read(folder(tmp_path, tensor))
    assert torch.equal(ours(model)[0], ours(model)[2])
    export(model, tmp_path / "back")
    assert_same(ours(read(tmp_path / "back")), theirs(tensor))


def test_in_bfloat16_the_bounds_lose_nothing(tmp_path: Path) -> None:
    tensor = spread(9.0, torch.bfloat16)
    model = read(folder(tmp_path, tensor, torch.bfloat16))
    assert model.dtype == torch.bfloat16
    export(model, tmp_path / "back")
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path, tmp_path / "back"))
    assert after[SHARED].dtype == torch.float32
    assert_same(theirs(after.pop(SHARED)), theirs(before.pop(SHARED)))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("bad", [0.5, float("nan")])
def test_bounds_that_fall_are_refused(bad: float, tmp_path: Path) -> None:
    model = read(folder(tmp_path, spread(1.0)))
    with torch.no_grad():
        for i, layer in enumerate(mixers(model)[1:]):
            layer.bound.fill_(float(i))
        mixers(model)[3].bound[5:7] = bad
    with pytest.raises(
        ValueError, match=r"hgrn2 cannot hold .* layer #3 falls at channel 5, from 0\.7311 to (0\.6225|nan); there"
    ):
        export(model, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("at", "said"), [({}, r"lower_bound: None, it would be 0\.0"), ({"X#0": {"lower_bound": 0.0}}, "")]
)
def test_of_ones_own(at: dict[str, Any], said: str, tmp_path: Path) -> None:
    """The first layer has no bound there; bounds that are drawn alike are held."""
    layers = {"X": plait.HGRN2(heads=2, norm_eps=8e-5), "F": plait.SwiGLU(hidden=24)}
    model = plait.build(plait.ModelConfig(vocab=11, dim=DIM, pattern="(XF)3", layers=layers, at=at), seed=0)
    if said:
        with pytest.raises(ValueError, match=said):
            export(model, tmp_path, to="hgrn2")
    else:
        export(model, tmp_path, to="hgrn2")
        assert torch.allclose(ours(read(tmp_path)), torch.zeros(2, DIM), atol=1e-7)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors: tensors.pop(SHARED), r"model\.lower_bounds"),
        (
            lambda tensors: tensors.update({SHARED: torch.zeros(3, DIM)}),
            r"lower_bounds has shape \(3, 16\), .* \(5, 16\)",
        ),
        (lambda tensors: tensors.update({"model.upper_bounds": torch.zeros(1)}), r"model\.upper_bounds"),
    ],
)
def test_a_tensor_missing_or_of_another_shape_or_unknown(change: Any, match: str, tmp_path: Path) -> None:
    path = folder(tmp_path, spread(1.0)) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=match):
        read(tmp_path)


def test_without_bounds_a_folder_has_no_such_tensor(tmp_path: Path) -> None:
    path = folder(tmp_path, spread(1.0))
    config = json.loads((path / "config.json").read_text(encoding="utf-8")) | {"use_lower_bound": False}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"model\.lower_bounds"):
        read(path)


def test_a_model_of_one_layer_has_no_bounds() -> None:
    with pytest.raises(ValueError, match="use_lower_bound: the only layer has no bound"):
        read_design(num_hidden_layers=1)
    assert read_design(num_hidden_layers=1, use_lower_bound=False).slots


def test_expand_ratio_says_how_many_heads() -> None:
    assert read_design(num_heads=7).hash == read_design(num_heads=None).hash == read_design(expand_ratio=None).hash
    for heads in (None, 17):
        with pytest.raises(
            ValueError, match=f"num_heads {heads} and expand_ratio .* do not say how wide a head of 16 is"
        ):
            read_design(num_heads=heads, expand_ratio=None)
