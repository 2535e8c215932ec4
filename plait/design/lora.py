"""Low-rank additions to a model's projections (LoRA, arXiv 2106.09685), as data: which, how large, under which names.

The names are PEFT's, so that its files and ours are the same.
"""

from plait.design import declared
from plait.design.model import ModelConfig
from plait.design.places import prefixed
from plait.design.spelling import suggest
from plait.design.struct import Struct, between, positive
from plait.design.weights import Constant, Uniform, Weight, Weights

HEAD = "lm_head"


class LoRA(Struct, frozen=True, kw_only=True, tag=False):
    """y = W x + alpha / rank * B A x, of which A and B alone are trained and kept (arXiv 2106.09685).

    rank: rows of A and columns of B, so the rank of what is added to W.
    alpha: how much of it is added; null: twice the rank, as is usual.
    dropout: share of x that A does not see in training.
    targets: which projections: names (qkv_proj, slots.3.mixer.out_proj), letters (A), addresses ("F#0"), or lm_head, where the
        head has a matrix of its own; none: all of the layers and merges.
    seed: of A; B begins as zeros, so that the first step begins with the model as it is.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "rank", "alpha")
        between(self, 0, 2**63 - 1, "seed")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA.dropout must be at least 0 and below 1, got {self.dropout}")
        if self.alpha is None:
            self._set("alpha", 2.0 * self.rank)

    @property
    def scale(self) -> float:
        assert self.alpha is not None
        return self.alpha / self.rank


def adapted_modules(design: ModelConfig, lora: LoRA) -> list[str]:
    """The projections that get an addition, by their names in the model. Raises ValueError for a target that is none, and
    where there is none."""
    known = _known(design)
    if not lora.targets:
        if known.keys() <= {HEAD}:
            raise ValueError(
                "lora: this design has no projection to add to; experts have none, nor shared layers with adapter_rank"
                + (f"; lora={{targets: [{HEAD}]}} adds to its head" if known else "")
            )
        return [module for module in known if module != HEAD]
    found: set[str] = set()
    for target in lora.targets:
        own = {module for module, names in known.items() if target in names}
        if not own:
            names = sorted({name for names in known.values() for name in names if "." not in name})
            raise ValueError(f"lora.targets: there is no projection {target!r} to adapt; {suggest(target, names)}")
        found |= own
    return [module for module in known if module in found]


def lora_weights(design: ModelConfig, lora: LoRA) -> Weights:
    """MODULE.lora_A.weight (rank, columns), uniform as torch's linear layers, and MODULE.lora_B.weight (rows, rank), zeros."""
    shapes = {weight.name: weight.shape for weight in declared.weights(design)}
    return tuple(weight for module in adapted_modules(design, lora) for weight in _pair(module, shapes, lora.rank))


def _pair(module: str, shapes: dict[str, tuple[int, ...]], rank: int) -> Weights:
    rows, columns = shapes[f"{module}.weight"]
    near = columns**-0.5
    return (
        Weight(f"{module}.lora_A.weight", (rank, columns), "matrix", Uniform(-near, near)),
        Weight(f"{module}.lora_B.weight", (rows, rank), "matrix", Constant(0.0)),
    )


def _known(design: ModelConfig) -> dict[str, set[str]]:
    """What each projection may be called, by its name in the model."""
    modules = declared.lora_targets(design)
    if any(weight.name == f"{HEAD}.weight" for weight in declared.head_weights(design)):
        modules.append(HEAD)
    called = {module: {module, module.rpartition(".")[2]} for module in modules}
    for prefix, place in prefixed(design.slots):
        for module in modules:
            if module.startswith(prefix):
                called[module] |= {place.letter, place.address}
    return called
