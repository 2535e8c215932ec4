"""Folders of other libraries, opened as models and written again: config, weights, tokenizer, nothing lost on the way."""

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from plait.design import declared
from plait.design.load import read_mapping
from plait.design.model import ModelConfig
from plait.design.places import layers
from plait.design.weights import FLOAT32
from plait.files import user_path, write_atomic, write_text
from plait.hub.advice import without_advice
from plait.hub.compare import first_difference
from plait.hub.families import NAMES, OUTER, Family, family
from plait.hub.families.fields import Fields
from plait.hub.families.left_over import left_over
from plait.hub.weight_table import NOTHING, Piece, by_theirs, fill, made, refusal, table, torn
from plait.model.build import empty_model, to_dtype
from plait.model.files import CONFIG, ENDS, bare, carried_files
from plait.model.language_model import LanguageModel
from plait.model.lora import merged_tensors
from plait.model.weight_files import INDEX, SHARD_BYTES, WEIGHTS, WeightFiles, WeightSource, weight_files, write_weights

HEAD = "lm_head.weight"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "consolidated.00.pth")


def read(folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> LanguageModel:
    """A model of the folder's config and weights, in the dtypes of the file unless `dtype` says otherwise.

    Raises ValueError or FileNotFoundError naming the field or the tensor that plait cannot read, is missing or is left over.
    """
    raw = read_mapping(folder / CONFIG)
    found = family_of(raw, folder / CONFIG)
    raw = text_config(raw, folder / CONFIG)
    design = design_of(found, raw, str(folder / CONFIG))
    files = _weights(folder)
    model = empty_model(design, device=device)
    model.origin = {"family": found.model_type, "config": raw, **fill_model(model, found, files, torch.device(device))}
    model.tokenizer_files = carried_files(folder)
    return model if dtype is None else to_dtype(model, dtype)


def folder_design(folder: Path) -> ModelConfig:
    """The design of the folder's config, without reading weights."""
    raw = read_mapping(folder / CONFIG)
    found = family_of(raw, folder / CONFIG)
    return design_of(found, text_config(raw, folder / CONFIG), str(folder / CONFIG))


def family_of(raw: dict[str, Any], where: Path) -> Family:
    """Raises ValueError for one that plait does not read, or whose weights are quantised."""
    if not isinstance(raw.get("model_type"), str):
        whose = (
            "; this one is of the mamba_ssm package, of which transformers' form is read" if "ssm_cfg" in raw else ""
        )
        raise ValueError(f"{where}: 'model_type' is missing; expected a folder of plait or transformers{whose}")
    if method := _quantised(raw) or _quantised(raw.get("text_config")):
        raise ValueError(
            f"{where}: weights quantised by {method!r} are not read; save the model dequantised (in transformers: "
            "model.dequantize().save_pretrained(FOLDER)) and load that"
        )
    try:
        return family(OUTER.get(raw["model_type"]) or raw["model_type"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _quantised(config: Any) -> str | None:
    """By which method a config says that weights are quantised; None where it does not."""
    said = config.get("quantization_config") or config.get("quantization") if isinstance(config, dict) else None
    return str(said.get("quant_method", "some method") if isinstance(said, dict) else said) if said else None


def text_config(raw: dict[str, Any], where: Path) -> dict[str, Any]:
    """The config itself or, of a model of several parts, that of its text model."""
    if raw["model_type"] not in OUTER:
        return raw
    if not isinstance(raw.get("text_config"), dict):
        raise ValueError(f"{where}: 'text_config' is missing; plait reads the text model of a {raw['model_type']}")
    tied = {"tie_word_embeddings": raw["tie_word_embeddings"]} if "tie_word_embeddings" in raw else {}
    return tied | raw["text_config"] | {"model_type": OUTER[raw["model_type"]]}


def design_of(found: Family, raw: dict[str, Any], where: str) -> ModelConfig:
    """The design that a config describes. Every field of it has been read, or is an error."""
    values = normalised(found, raw, where).to_dict()
    turned = values.get("rope_parameters") or {}
    if "partial_rotary_factor" in turned and turned["partial_rotary_factor"] == values.get("partial_rotary_factor"):
        del values["partial_rotary_factor"]  # transformers before 5.20 has it in both places
    fields = Fields(values, where)
    try:
        design = found.design(fields)
    except ValueError as error:
        raise error if str(error).startswith(where) else ValueError(f"{where}: {error}") from None
    except (ArithmeticError, TypeError) as error:
        culprits = fields.blank(0 if isinstance(error, ArithmeticError) else None)
        raise ValueError(f"{where}: no model can be made of {culprits} ({error})") from None
    fields.check()
    return design


def normalised(found: Family, raw: dict[str, Any], where: str) -> PreTrainedConfig:
    """The config with transformers' defaults where it says nothing, older spellings in the newest, and nothing left over."""
    known = {name: value for name, value in raw.items() if name not in left_over(found.model_type, raw)}
    numbers = json.loads(json.dumps(known), object_hook=_number)
    try:
        with without_advice():
            if found.defaults is not None:
                return PreTrainedConfig.from_dict({**found.defaults, **numbers})
            return CONFIG_MAPPING[found.model_type].from_dict(numbers)
    except Exception as error:  # their validation raises whatever it likes
        raise ValueError(f"{where}: not a config of {found.model_type}: {' '.join(str(error).split())}") from None


def _number(x: dict[str, Any]) -> Any:
    """transformers writes infinity, for which JSON has no number, as an object."""
    return float(x["__float__"]) if x.keys() == {"__float__"} else x


def pieces(found: Family, design: ModelConfig, known: Mapping[str, int] = NOTHING) -> list[Piece]:
    """Where all weights of a design lie in a folder of the family, with tensors that are `known` where there is a choice."""
    ends = (*declared.front_weights(design), *declared.head_weights(design))
    slots = declared.slot_weights(design)
    named = zip(slots, found.slots(design), strict=True)
    return [
        *table(ends, found.ends, known=known),
        *(piece for weights, slot in named for piece in table(weights, slot.rules, slot.ours, slot.theirs, known)),
    ]


def _weights(folder: Path) -> WeightFiles:
    if not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
        pickle = next((name for name in PICKLES if (folder / name).is_file()), None)
        if pickle:
            raise ValueError(
                f"{folder / pickle}: a pickle, which runs code when it is read; convert it once, where its maker is trusted: "
                "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW) writes safetensors"
            )
    return weight_files(folder)


def fill_model(model: LanguageModel, found: Family, files: WeightSource, device: torch.device) -> dict[str, Any]:
    """Read tensor by tensor; each must be there, be used, and have the right shape. Gives what is to be known for the way back:
    `dtypes` that were widened, and `names`, with how much is there, that are not the family's first choice."""
    names = {stored: found.named(stored) for stored in files.where}
    there = set(names.values())
    if len(there) < len(names):
        twice = next(stored for stored, name in names.items() if stored != name and name in names)
        raise ValueError(f"{files.path_of(twice)}: {twice} is there twice, also as {names[twice]}")
    tensors = by_theirs(pieces(found, model.design, {names[stored]: count for stored, count in files.sizes().items()}))
    aliases = {stored for stored, name in names.items() if name not in tensors and is_alias(name, found, model.design)}
    files.expect({stored for stored, name in names.items() if name in tensors} | (tensors.keys() - there) | aliases)
    owners = dict(model.named_parameters())
    stored_as = {names[stored]: dtype for stored, dtype in files.dtypes().items()}
    dtypes = _dtypes(model.design, tensors, stored_as)
    for name, parameter in owners.items():
        parameter.data = torch.empty(parameter.shape, dtype=dtypes[name], device=device)
    places = {name: parameter.detach() for name, parameter in owners.items()}
    on_meta = {name: torch.empty(place.shape, device="meta") for name, place in places.items()}
    widened: dict[str, str] = {}
    for stored, tensor in files:
        if stored in aliases:
            continue
        name = names[stored]
        expected = made(tensors[name], on_meta).shape
        if tensor.shape != expected:
            raise ValueError(
                f"{files.path_of(stored)}: {stored} has shape {tuple(tensor.shape)}, the config asks for {tuple(expected)}"
            )
        if dtypes[tensors[name][0].ours] != tensor.dtype and tensors[name][0].form.exact:
            widened[name] = str(tensor.dtype).removeprefix("torch.")
        fill(tensors[name], tensor, places)
    _check_tied(model, files)
    return {"dtypes": widened, "names": _not_first(found, model.design, tensors)}


def _not_first(found: Family, design: ModelConfig, tensors: dict[str, list[Piece]]) -> dict[str, int]:
    """The tensors where the family's first choice is another (of experts: of the first), and how many numbers they hold."""
    first = {piece.theirs: piece.numel for piece in pieces(found, design)}
    return {
        name: parts[0].numel
        for name, parts in tensors.items()
        if not parts[0].index and parts[0].numel != first.get(name)
    }


def is_alias(name: str, found: Family, design: ModelConfig) -> bool:
    """Whether a tensor repeats another or is computed anew: older files hold some."""
    return (design.tied and name == HEAD) or any(re.fullmatch(alias, name) for alias in found.aliases)


def _check_tied(model: LanguageModel, files: WeightSource) -> None:
    """Some files hold the tied matrix twice."""
    if model.design.tied and HEAD in files.where:
        given = files.tensor(HEAD)
        embeddings = dict(model.named_parameters())["embed.weight"].detach()
        if given.shape != embeddings.shape or not torch.equal(given.to(embeddings), embeddings):
            raise ValueError(
                f"{files.path_of(HEAD)}: {HEAD} is not the embeddings, which the config ties it to; set tie_word_embeddings "
                "to false"
            )


def _dtypes(
    design: ModelConfig, tensors: dict[str, list[Piece]], stored: dict[str, torch.dtype]
) -> dict[str, torch.dtype]:
    """Of each of our tensors: the widest of what it is made of, and float32 at least where rounding ruins it."""
    wide = {weight.name for weight in declared.weights(design) if weight.role in FLOAT32}
    dtypes = dict.fromkeys(wide, torch.float32)
    for name, parts in tensors.items():
        for piece in parts:
            dtypes[piece.ours] = torch.promote_types(dtypes.get(piece.ours, stored[name]), stored[name])
    return dtypes


class _Theirs(Mapping[str, Tensor]):
    """Their tensors, each made when it is asked for."""

    def __init__(self, tensors: dict[str, list[Piece]], ours: Mapping[str, Tensor], dtypes: Mapping[str, str]):
        self.tensors, self.ours, self.dtypes = tensors, ours, dtypes

    def __getitem__(self, name: str) -> Tensor:
        tensor = made(self.tensors[name], self.ours)
        return tensor.to(getattr(torch, self.dtypes[name])) if name in self.dtypes else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def export(model: LanguageModel, folder: str | Path, to: str | None = None, *, shard_bytes: int = SHARD_BYTES) -> str:
    """Write a folder that transformers loads as a model of the family `to`, by default the one it was read from, and give
    the family's name.

    Config fields that say nothing about the numbers, the tokenizer and generation_config.json are carried along. Raises
    ValueError, before anything is written, where the family cannot hold the design, naming the first slot and why.
    """
    model, folder = bare(model), user_path(folder)
    origin = model.origin
    to = to or (origin["family"] if origin else None)
    if to is None:
        raise ValueError(f"this model came from no family; say which one it is to be: {', '.join(NAMES)}")
    found = family(to)
    same = origin if origin and origin["family"] == found.model_type else {"config": {}, "dtypes": {}}
    dtype = str(model.dtype).removeprefix("torch.")
    config = config_of(found, model.design, same["config"] or _end_tokens(model))
    where = pieces(found, model.design, same.get("names", NOTHING))
    tensors = by_theirs(where)
    ours = {name: x.detach() for name, x in (*model.named_parameters(), *model.named_buffers())}
    ours = merged_tensors(model, ours)
    if apart := torn(where, ours):
        raise ValueError(f"{to} cannot hold this model: {' and '.join(apart)} are one tensor there, and differ here")
    for parts in tensors.values():
        if why := refusal(parts, ours):
            raise ValueError(f"{to} cannot hold this model: {why}")
    theirs = _Theirs(tensors, ours, {name: old for name, old in same["dtypes"].items() if old == dtype})
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, theirs, {"format": "pt"}, shard_bytes)
    for name, content in model.tokenizer_files.items():
        write_atomic(folder / name, partial(_write_bytes, content))
    own = {"architectures": [found.architecture], "dtype": dtype, "model_type": found.model_type}
    text = json.loads(config.to_json_string(use_diff=False)) | left_over(to, same["config"]) | own
    write_text(folder / CONFIG, json.dumps(text, indent=2) + "\n")
    return found.model_type


def _end_tokens(model: LanguageModel) -> dict[str, Any]:
    """The ids that begin, end and pad a text, which their configs hold too: none but those that the tokenizer's files say."""
    said = json.loads(model.tokenizer_files.get(ENDS, b"{}"))
    return {name: said.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def config_of(found: Family, design: ModelConfig, carried: dict[str, Any]) -> PreTrainedConfig:
    """The config that describes a design: the one that was `carried` where it does, since a design may be said in several ways;
    else one of the family's, with what was carried where that says nothing about the design. Raises ValueError where the family
    has none that does."""
    name = found.model_type
    for place in layers(design.slots):
        if not isinstance(place.layer, found.holds):
            kinds = ", ".join(str(kind.__struct_config__.tag) for kind in found.holds)
            tag = place.layer.__struct_config__.tag
            raise ValueError(f"{name} cannot hold {place.address}: it is a {tag}, and {name} has {kinds}")
    if "model_type" in carried and design_of(found, carried, name).hash == design.hash:
        return normalised(found, carried, name)
    given = found.config(design)
    for fields in found.alike:
        rest = {field: value for field, value in given.items() if field not in fields}
        given = given if _difference(found, design, carried | rest) else rest
    if difference := _difference(found, design, carried | given):
        raise ValueError(f"{name} cannot hold {difference}")
    return normalised(found, carried | given, name)


def _difference(found: Family, design: ModelConfig, config: dict[str, Any]) -> str | None:
    """How the design that a config describes is another, in words."""
    try:
        again = design_of(found, config, found.model_type)
    except ValueError as error:
        return f"this design: {error}"
    return first_difference(design, again)
