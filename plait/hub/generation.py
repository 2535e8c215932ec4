"""transformers' generate, as far as a plait model differs from what it expects."""

from typing import Any

from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import GenerationMode

from plait.hub.inputs import whole_numbers

FOR_GENERATE_ALONE = ("tokenizer", "assistant_tokenizer")  # it hands them on to the model's every call


class Generation(GenerationMixin):
    """Decoding goes on from a state: prompts end with a token, and nothing is taken back."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if is_first_iteration and attention_mask is not None and (attention_mask[:, -1] == 0).any():
            raise ValueError(
                "prompts must be padded on the left, or a row would go on from padding: padding_side='left'"
            )
        theirs: Any = super()
        return theirs.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length,
            past_key_values,
            attention_mask,
            inputs_embeds,
            is_first_iteration,
            **{name: value for name, value in kwargs.items() if name not in FOR_GENERATE_ALONE},
        )

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """The prompt in a dtype that can be compared and concatenated, whichever it came in."""
        theirs: Any = super()
        inputs, name, rest = theirs._prepare_model_inputs(*args, **kwargs)
        return (whole_numbers(name, inputs) if name == "input_ids" else inputs), name, rest

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """None: a plait model counts for itself, and checking numbers asks the device for them at every token."""

    def _validate_generation_mode(self, generation_mode: Any, *args: Any, **kwargs: Any) -> None:
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "assisted decoding (assistant_model, prompt_lookup_num_tokens) takes drafts back, and a recurrent state "
                "cannot be cut back; generate without, or verify drafts by hand: a plait.ModelState from before stays valid"
            )
        theirs: Any = super()
        theirs._validate_generation_mode(generation_mode, *args, **kwargs)
