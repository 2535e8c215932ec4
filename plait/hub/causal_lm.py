"""A language model behind transformers' interface."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from plait.design import declared
from plait.design.weights import FLOAT32
from plait.hub.cache import PlaitCache
from plait.hub.config import PlaitConfig
from plait.hub.generation import Generation
from plait.hub.inputs import check_cache_position, check_labels, document_starts, last_columns, refuse, whole_numbers
from plait.layers import Channels
from plait.model.build import init_weights, to_dtype
from plait.model.language_model import LanguageModel
from plait.model.loss import IGNORE, CrossEntropy, loss_of
from plait.run_folder import check_model

PREFIX = "model."
# torch's names for what it wraps: compiled, in DataParallel or DDP, in FSDP, checkpointed
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class PlaitForCausalLM(PreTrainedModel, Generation, GenerationMixin):  # the last by name: transformers looks for it
    """`model` is the `LanguageModel`, for everything of plait's that takes one."""

    config: PlaitConfig
    config_class = PlaitConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch
    _no_split_modules = ["Sublayer"]

    def __init__(self, config: PlaitConfig):
        super().__init__(config)
        design = config.model_config
        wide = (weight.name for weight in declared.weights(design) if weight.role in FLOAT32)
        self._keep_in_fp32_modules_strict = {name.rpartition(".")[2] for name in wide}
        self.model = init_weights(LanguageModel(design), torch.initial_seed())
        to_dtype(self.model, torch.get_default_dtype())
        self.gradient_checkpointing = False
        self.shared = _shared(self)
        self.register_load_state_dict_pre_hook(_own_names)
        self.post_init()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A subclass is a causal language model too, where transformers asks by name."""
        super().__init_subclass__(**kwargs)
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[cls.__name__] = cls.__name__

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the constructor has done it, and a checkpoint that lacks a tensor is refused."""

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the rest of transformers' arguments pass through
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As everywhere in transformers; missing or unused tensors and damaged checkpoints are errors, as in `plait.load`."""
        check_model(Path(pretrained_model_name_or_path))
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        missing, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        if missing or unused:
            raise ValueError(
                f"{pretrained_model_name_or_path}: missing tensors {missing[:3]}, unused tensors {unused[:3]} "
                "(first three of each)"
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(  # type: ignore[override]  # the rest of transformers' arguments pass through
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As everywhere in transformers; tensors get the model's own names, so that `plait.load` reads them too.

        A state_dict may be that of the model compiled, in DataParallel, DDP or FSDP.
        """
        if getattr(self, "_hf_peft_config_loaded", False):  # adapters alone are saved, by transformers' names
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
            return
        state_dict = self.state_dict() if state_dict is None else state_dict
        named = {_own_name(name): tensor for name, tensor in state_dict.items()}
        for name in self.shared:  # a shared layer's weights are written once, under its first use
            named.pop(_own_name(name), None)
        super().save_pretrained(save_directory, is_main_process, named, **kwargs)

    def forward(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Int[Tensor, "b t"] | None = None,
        past_key_values: PlaitCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Int[Tensor, "b t"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and where asked for the cache after these tokens and the loss.

        attention_mask: 1 for tokens, 0 for padding on either side; with a cache it may cover the past too.
        position_ids: not needed. Where they start again at 0, rows are packed documents that do not see each other, and
        the first token of a document is not learned from the one before.
        labels: the input_ids themselves (shifted here) with -100 where nothing is to be learned; what is predicted from
        padding never counts. The loss is the mean over the scored tokens, or their sum over num_items_in_batch, and where
        gradients are taken the layers' own losses too, as in plait's training.
        logits_to_keep: logits of the last so many positions only (0: all), or of these positions.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("a plait model reads input_ids; inputs_embeds is not supported")
        if output_attentions or output_hidden_states:
            raise ValueError("output_attentions and output_hidden_states are not supported by plait models")
        refuse(others)
        input_ids = whole_numbers("input_ids", input_ids)
        labels = None if labels is None else check_labels(labels, input_ids, self.model.design.vocab)
        self._check_cache(past_key_values)
        mask = last_columns(attention_mask, input_ids, past_key_values)
        check_cache_position(cache_position, input_ids.shape[1], past_key_values)
        starts = document_starts(position_ids, input_ids, mask, past_key_values)
        cache = self._cache(past_key_values, use_cache, packed=starts is not None)
        sent = Channels()
        ask = None if labels is None else sent
        hidden = self._features(input_ids, mask, cache, ask) if starts is None else self._packed(input_ids, starts, ask)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if labels is None:
            loss, logits = None, self.model.head(hidden[:, keep])
        else:
            if starts is not None:
                labels = labels.masked_fill(starts.to(labels.device), IGNORE)
            logits = self.model.head(hidden)
            loss = mean_loss(logits, labels, mask, num_items_in_batch, sent.losses_by_name())
            logits = logits[:, keep]
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)  # type: ignore[arg-type]  # their annotation lacks Tensor
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    @staticmethod
    def _check_cache(given: Any) -> None:
        if given is not None and not isinstance(given, PlaitCache):
            raise ValueError(f"past_key_values must be a plait.hub.PlaitCache, got {type(given).__name__}")

    def _cache(self, given: PlaitCache | None, use_cache: bool | None, packed: bool) -> PlaitCache | None:
        if packed:
            if given is not None or use_cache:
                raise ValueError(
                    "documents packed by position_ids leave no cache; use_cache=False, or one document a row"
                )
            return None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return PlaitCache() if given is None and use_cache else given

    def _packed(self, tokens: Int[Tensor, "b t"], starts: Tensor, sent: Channels | None) -> Float[Tensor, "b t d"]:
        """Rows of packed documents, read as one row of them."""
        end = torch.tensor([starts.numel()], device="cpu")
        offsets = torch.cat([starts.flatten().nonzero().flatten(), end])
        hidden, _ = self.model.features(tokens.flatten()[None], cu_seqlens=offsets, channels=sent)
        return hidden[0].unflatten(0, tokens.shape)

    def _features(
        self, tokens: Int[Tensor, "b t"], mask: Tensor | None, cache: PlaitCache | None, sent: Channels | None
    ) -> Float[Tensor, "b t d"]:
        if cache is None:
            return self.model.features(tokens, attention_mask=mask, channels=sent)[0]
        before = self.model.init_state(len(tokens)) if cache.state is None else cache.state
        hidden, cache.state = self.model.features(tokens, before, attention_mask=mask, channels=sent)
        cache.length += tokens.shape[1]
        return hidden

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.lm_head

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Which parameters transformers has to make one again after loading."""
        return dict(self.shared)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """A vocabulary belongs to the design: only its own size is accepted."""
        if new_num_tokens not in (None, self.model.design.vocab):
            raise ValueError(
                f"this model was designed for a vocabulary of {self.model.design.vocab}, not {new_num_tokens}; "
                "build one with the vocabulary that is needed"
            )
        return self.model.embed

    def _set_gradient_checkpointing(
        self, enable: bool = True, *args: Any, every_n_layers: int = 1, **kwargs: Any
    ) -> None:
        """Every slot is recomputed, by torch's non-reentrant checkpointing whatever transformers was asked for."""
        if every_n_layers != 1:
            raise ValueError(f"plait checkpoints every slot or none; got every_n_layers={every_n_layers}")
        self.gradient_checkpointing = self.model.activation_checkpointing = enable

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing: transformers would copy this file into saved folders, which import the installed plait instead."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: the first call makes the cache."""
        return False


def mean_loss(
    logits: Float[Tensor, "b t v"],
    labels: Int[Tensor, "b t"],
    mask: Tensor | None,
    count: Tensor | int | None,
    layers: Mapping[str, Float[Tensor, ""]],
) -> Float[Tensor, ""]:
    """Mean (or sum / count) of -log p over the labels that are not -100, scored by the logits one place before, and of the
    layers' losses; 0 where there are none."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE).to(logits.device)
    if mask is not None:
        targets = targets.masked_fill(mask == 0, IGNORE)
    loss = loss_of(logits, CrossEntropy(targets)).plus(layers)
    return loss.mean if count is None else loss.total / torch.as_tensor(count, device=logits.device).clamp_min(1)


def _shared(module: nn.Module) -> dict[str, str]:
    """The names of parameters that a shared layer has in its later uses, each with the one in its first use."""
    first: dict[nn.Parameter, str] = {}
    names = [(name, first.setdefault(p, name)) for name, p in module.named_parameters(remove_duplicate=False)]
    return {name: source for name, source in names if name != source}


def _own_name(name: str) -> str:
    """A parameter's name in the `LanguageModel`, whatever the model was wrapped in."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS).removeprefix(PREFIX)


def _own_names(module: PlaitForCausalLM, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Let `load_state_dict` take files that `save_pretrained` or `plait.save` wrote, as Trainer does to resume."""
    for name in [name for name in state_dict if name.startswith(prefix) and not name.startswith(prefix + PREFIX)]:
        state_dict[prefix + PREFIX + name.removeprefix(prefix)] = state_dict.pop(name)
    for name, source in module.shared.items():
        if prefix + source in state_dict:
            state_dict.setdefault(prefix + name, state_dict[prefix + source])
