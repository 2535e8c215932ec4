"""A config's fields, each of which somebody must have looked at."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from plait.design.layers import RoPE
from plait.design.layers.rope import Linear, Llama3, YaRN

# what says nothing about the numbers that a model computes; carried along
CARRIED = frozenset(
    [
        *("_name_or_path", "architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class"),
        *("chunk_size_feed_forward", "id2label", "label2id", "is_encoder_decoder", "problem_type", "return_dict"),
        *("output_attentions", "output_hidden_states", "use_cache", "initializer_range", "max_position_embeddings"),
        *("attention_dropout", "hidden_dropout", "residual_dropout", "embd_pdrop", "resid_pdrop", "pretraining_tp"),
    ]
)


class Fields(Mapping[str, Any]):
    """`fields["hidden_size"]`, and at the end `fields.check()`: a field that nobody read may change what the model computes."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values_, self.where = dict(values), where
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        if name not in self.values_:
            raise ValueError(f"{self.where}: {name!r} is missing")
        return self.values_[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        value = self.values_.get(name)
        return default if value is None else value

    def must(self, **expected: Any) -> None:
        """These fields have these values (or one of a tuple of them), where they are given at all."""
        for name, values in expected.items():
            values = values if isinstance(values, tuple) else (values,)
            value = self.get(name, values[0])
            if value not in values:
                allowed = " or ".join(map(repr, values))
                raise ValueError(f"{self.where}: {name} {value!r} is not supported; plait reads {allowed}")

    def one_of(self, name: str, choices: Mapping[Any, Any]) -> Any:
        """What the field's value stands for."""
        value = self[name]
        if value not in choices:
            allowed = " or ".join(map(repr, choices))
            raise ValueError(f"{self.where}: {name} {value!r} is not supported; plait reads {allowed}")
        return choices[value]

    def each_of(self, name: str, choices: Mapping[Any, Any]) -> list[Any]:
        """The same of every value in a list."""
        if unknown := [value for value in self[name] if value not in choices]:
            allowed = " or ".join(map(repr, choices))
            raise ValueError(f"{self.where}: {name} has {unknown[0]!r}, which is not supported; plait reads {allowed}")
        return [choices[value] for value in self[name]]

    def carried(self, *names: str) -> None:
        """Fields of this family that say nothing about what its model computes."""
        self.read |= set(names)

    def blank(self, nothing: int | None) -> str:
        """The fields that have been read and say 0, or null: for an error that comes of one."""
        read = sorted(self.read & self.values_.keys() - CARRIED)
        found = [name for name in read if self.values_[name] == nothing and self.values_[name] is not False]
        return ", ".join(f"{name} {'null' if nothing is None else nothing}" for name in found) or "this config"

    def check(self) -> None:
        """Raise ValueError for a field that has not been read."""
        left = sorted(
            name for name, value in self.values_.items() if name not in self.read | CARRIED and value is not None
        )
        if left:
            raise ValueError(
                f"{self.where}: plait does not know {left[0]!r} ({self.values_[left[0]]!r}), which may change what the model "
                "computes; was the config written by a newer version?"
            )


def rope(fields: Fields, parameters: Mapping[str, Any] | None = None, partial: bool = False) -> RoPE:
    """Of `rope_parameters`, in the form that transformers' config classes give them. partial: whether the family's class heeds
    a `partial_rotary_factor`; the others turn whole heads whatever it says."""
    given = Fields(fields["rope_parameters"] if parameters is None else parameters, f"{fields.where}: rope_parameters")
    given.must(rope_type=("default", "linear", "llama3", "yarn"))
    kind = given["rope_type"]
    scaling: Any = None
    if kind == "linear":
        scaling = Linear(factor=given["factor"])
    elif kind == "llama3":
        low, high = given["low_freq_factor"], given["high_freq_factor"]
        scaling = Llama3(factor=given["factor"], low=low, high=high, original=given["original_max_position_embeddings"])
    elif kind == "yarn":
        scaling = _yarn(given, fields)
    if not partial:
        given.must(partial_rotary_factor=1)
    share = given.get("partial_rotary_factor", 1.0)
    given.carried("original_max_position_embeddings", "type")
    found = RoPE(theta=float(given["rope_theta"]), fraction=share, scaling=scaling)
    given.check()
    return found


def _yarn(given: Fields, fields: Fields) -> YaRN:
    original = given.get("original_max_position_embeddings") or fields["max_position_embeddings"]
    attention = given.get("attention_factor")
    mscale, all_dim = given.get("mscale"), given.get("mscale_all_dim")
    if attention is None and mscale and all_dim:
        attention = _mscale(given["factor"], mscale) / _mscale(given["factor"], all_dim)
    return YaRN(
        factor=given["factor"],
        original=original,
        beta_fast=given.get("beta_fast", 32.0),
        beta_slow=given.get("beta_slow", 1.0),
        attention_factor=attention,
        truncate=given.get("truncate", True),
    )


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_parameters(rope: RoPE, partial: bool = False) -> dict[str, Any]:
    """The same, of a RoPE. partial: also how much of a head turns."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    match rope.scaling:
        case Linear(factor=factor):
            parameters |= {"rope_type": "linear", "factor": factor}
        case Llama3() as s:
            names = {
                "low_freq_factor": s.low,
                "high_freq_factor": s.high,
                "original_max_position_embeddings": s.original,
            }
            parameters |= {"rope_type": "llama3", "factor": s.factor, **names}
        case YaRN() as s:
            parameters |= {"rope_type": "yarn", "factor": s.factor, "original_max_position_embeddings": s.original}
            parameters |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
            parameters |= {} if s.attention_factor is None else {"attention_factor": s.attention_factor}
    return parameters | ({"partial_rotary_factor": rope.fraction} if partial or rope.fraction != 1 else {})
