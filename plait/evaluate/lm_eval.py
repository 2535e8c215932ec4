"""plait's models in EleutherAI's lm-eval package (0.4.13), where that is installed: `--model plait`.

    python -m plait.evaluate.lm_eval run --model plait --model_args pretrained=runs/first --tasks arc_easy

runs lm-eval's own command with plait among its models; so does `import plait.evaluate.lm_eval` in a program that calls lm-eval.
What is too long for a model is an error, never cut off.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from plait.data import load_tokenizer
from plait.engine import generate
from plait.engine.decode import check_vocab
from plait.evaluate.likelihood import loglikelihoods
from plait.model.device import find_device, find_dtype
from plait.opening import load, model_path

UNSAID = "cuda:0"  # the device that lm-eval's command gives where its user names none
MOST = 256  # new tokens where a task does not say, as lm-eval's own models
TAKEN = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}


@register_model("plait")
class PlaitLM(TemplateLM):
    """pretrained: what `plait.load` opens, as a run's folder, a saved model's, one of transformers, a GGUF file.
    batch_size: contexts read at once; "auto": as `plait.evaluate.likelihood.answers`. dtype: else as in the file.
    max_length: tokens of a window of loglikelihood_rolling; else as positions go, and the whole text where they have no end.
    A text's first token follows the end of a text. Chat templates are not applied."""

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
    ):
        super().__init__()
        del max_batch_size  # lm-eval gives it to every model
        folder = model_path(pretrained)
        self._device = find_device("auto" if device in (None, UNSAID) else device)
        self.model = load(folder, device=self._device, dtype=find_dtype(dtype))
        self.ids = load_tokenizer(folder)
        check_vocab(self.model, self.ids)
        self.most = int(max_length) if max_length else self.model.max_positions
        self.rows = None if str(batch_size).startswith("auto") else int(batch_size)

    @property
    def eot_token_id(self) -> int:
        return self.ids.eos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.ids.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = ((context, continuation, _name(texts)) for texts, context, continuation in requests)
        found = []
        for (texts, *_), scored in zip(requests, loglikelihoods(self.model, pairs, self.rows), strict=True):
            found.append((scored.loglikelihood, scored.greedy))
            self.cache_hook.add_partial("loglikelihood", texts, found[-1])
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """ln p of each whole text: read through the state to its end, or in windows where positions end before it."""
        found = []
        for request in requests:
            (text,) = request.args
            scored = loglikelihoods(self.model, self._windows(text), self.rows)
            found.append(sum(part.loglikelihood for part in scored))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int], str]]:
        ids = self.ids.encode(text)
        most = self.most or max(1, len(ids))
        for window in get_rolling_token_windows(ids, self.eot_token_id, most, 1):
            yield (*make_disjoint_window(window), _name((text,)))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        found: list[str] = []
        for how, same in groupby((request.args for request in requests), key=lambda asked: asked[1]):
            contexts = [asked[0] for asked in same]
            rows = self.rows or 16
            for start in range(0, len(contexts), rows):
                texts = self._generate(contexts[start : start + rows], how)
                for context, text in zip(contexts[start:], texts, strict=False):
                    self.cache_hook.add_partial("generate_until", (context, how), text)
                found += texts
        return found

    def _generate(self, contexts: list[str], how: dict[str, Any]) -> list[str]:
        if unknown := sorted(set(how) - TAKEN):
            raise ValueError(f"generation option {unknown[0]!r}: plait takes {', '.join(sorted(TAKEN))}")
        until = how.get("until") or []
        options = {name: how[name] for name in ("top_k", "top_p", "min_p", "repetition_penalty") if name in how}
        sampled = how.get("do_sample", how.get("temperature", 0.0) > 0)
        if not sampled:
            options = {name: value for name, value in options.items() if name == "repetition_penalty"}
        return generate(
            self.model,
            self.ids,
            contexts,
            max_tokens=how.get("max_gen_toks", MOST),
            temperature=how.get("temperature", 1.0) if sampled else 0.0,
            stop=[until] if isinstance(until, str) else until,
            **options,
        )


def _name(texts: tuple[str, ...]) -> str:
    return f"the request that begins {texts[0][:40]!r}"


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()
