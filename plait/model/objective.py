"""What a training step optimises: modules that take a batch and give a `Loss`."""

from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from plait.layers import Channels
from plait.model.language_model import LanguageModel
from plait.model.loss import KL, CrossEntropy, Loss, Mixed, SquaredError


class Batch(Protocol):
    """What a loader gives: inputs, ids (b, t) or vectors (b, t, f); targets, ids (b, t) or vectors (b, t, o); and the
    offsets of documents that are packed end to end, else None."""

    @property
    def inputs(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def cu_seqlens(self) -> Int[Tensor, " n+1"] | None: ...


class Objective(nn.Module):
    """`forward(batch) -> Loss`, by the `rule` of a subclass. Of its modules only `model` is trained; others, such as a
    teacher, it keeps as they are.

    Where gradients are taken, the loss is that of the rule and the layers' own. `channels` takes what the layers send, as in
    `LanguageModel.forward`.
    """

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model
        self.count_holds = False  # whether a step has seen that `count` is what the loss sums over

    def hidden(self, batch: Batch, channels: Channels | None = None) -> Float[Tensor, "b t d"]:
        """What the model's head reads."""
        return self.model.features(batch.inputs, cu_seqlens=batch.cu_seqlens, channels=channels)[0]

    def rule(self, batch: Batch) -> Any:
        """What the outputs are held against."""
        raise NotImplementedError(f"{type(self).__name__} has no rule(batch)")

    def count(self, batch: Batch) -> Int[Tensor, ""]:
        """How many positions of a batch count, known before it is run, on all ranks: targets not below 0, or all vectors. An
        objective whose rule scores others says how many."""
        if batch.targets.is_floating_point():
            return torch.tensor(batch.targets.shape[:-1].numel())
        return (batch.targets >= 0).sum()

    def forward(self, batch: Batch, channels: Channels | None = None) -> Loss:
        sent = Channels()
        loss = self.model.head.loss(self.hidden(batch, sent), self.rule(batch)).plus(sent.losses_by_name())
        if channels is not None:
            channels.join(sent)
        return loss


class NextToken(Objective):
    """Cross-entropy of the targets; those below 0 are not scored."""

    def rule(self, batch: Batch) -> CrossEntropy:
        return CrossEntropy(batch.targets)


class Regression(Objective):
    """Squared error of vectors."""

    def rule(self, batch: Batch) -> SquaredError:
        return SquaredError(batch.targets)


class Distillation(Objective):
    """KL to a teacher of the same vocabulary at the scored positions, and `cross_entropy` times the targets' own loss."""

    def __init__(
        self, model: LanguageModel, teacher: LanguageModel, *, temperature: float = 1.0, cross_entropy: float = 0.0
    ):
        super().__init__(model)
        if teacher.design.vocab != model.design.vocab:
            raise ValueError(
                f"the teacher has a vocabulary of {teacher.design.vocab}, this model one of {model.design.vocab}: "
                "distillation needs equal ones"
            )
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature, self.cross_entropy = temperature, cross_entropy

    def train(self, mode: bool = True) -> "Distillation":
        super().train(mode)
        self.teacher.eval()
        return self

    def rule(self, batch: Batch) -> KL | Mixed:
        with torch.no_grad():
            theirs, _ = self.teacher.features(batch.inputs, cu_seqlens=batch.cu_seqlens)
        kl = KL(theirs, self.teacher.head, self.temperature, batch.targets >= 0)
        return Mixed(((1.0, kl), (self.cross_entropy, CrossEntropy(batch.targets)))) if self.cross_entropy else kl


def token_loss(
    model: LanguageModel,
    inputs: Int[Tensor, "b t"],
    targets: Int[Tensor, "b t"],
    *,
    cu_seqlens: Int[Tensor, " n+1"] | None = None,
    attention_mask: Tensor | None = None,
    channels: Channels | None = None,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Sum over the scored targets (those not below 0) of -log p in nats, without the layers' losses, and how many there are."""
    if targets.shape != inputs.shape:
        raise ValueError(f"targets must have the inputs' shape {tuple(inputs.shape)}, got {tuple(targets.shape)}")
    hidden, _ = model.features(inputs, cu_seqlens=cu_seqlens, attention_mask=attention_mask, channels=channels)
    loss = model.head.loss(hidden, CrossEntropy(targets))
    return loss.total, loss.count
