"""The losses that training minimises. An objective holds the model and is the root of FSDP.

`NextToken` is the ordinary loss. `Replay` gives the sequences of general text a loss of their own,
so that the model does not forget. With distillation the base itself is the teacher there, because
an expanded model without its new blocks *is* its base.

Shapes: B sequences of T tokens, C hidden size.
"""

import torch
from torch import Tensor, nn

from llamapro import ops
from llamapro.model import LlamaForCausalLM
from llamapro.training.settings import ReplaySettings


class NextToken(nn.Module):
    """Cross-entropy of the next token, summed."""

    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor,
        documents: Tensor | None = None,
        replayed: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Computes the loss of a micro-batch.

        Args:
            input_ids: (B, T) token ids.
            targets: (B, T) the ids that should follow, `ops.IGNORE_INDEX` where none counts.
            documents: (B, T), as for `LlamaModel.forward`.
            replayed: the number of last sequences that are replayed; None if no rank has any in
                this micro-batch. This objective treats all sequences alike.

        Returns:
            The summed loss in nats, (), and the number of targets that count, () int64.
        """
        x = self.model.model(input_ids, documents=documents)  # (B, T, C)
        return self.cross_entropy(x, targets)

    def cross_entropy(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss of hidden states (B, T, C) and its number of targets."""
        head = self.model.lm_head.weight
        return ops.linear_cross_entropy(x.flatten(0, 1), head, targets.flatten())


class Replay(NextToken):
    """Gives replayed sequences a weight, or lets them teach the base's own predictions.

    Without distillation their loss is cross-entropy. With it the loss is KL(base || model) per
    token (Li & Hoiem, "Learning without Forgetting", 2016), with no second set of weights.
    """

    def __init__(self, model: LlamaForCausalLM, replay: ReplaySettings):
        super().__init__(model)
        self.weight, self.distill = replay.weight, replay.distill
        record = model.config.expansion
        assert record is not None  # `settings.check` refuses replay where every weight trains
        self.new_layers, self.base_vocab_size = record.new_layers, record.base_vocab_size

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor,
        documents: Tensor | None = None,
        replayed: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Computes the loss of a micro-batch, as `NextToken.forward`.

        Both results include the replayed sequences, which come last.
        """
        if replayed is None:
            return super().forward(input_ids, targets, documents)
        split = len(input_ids) - replayed
        teacher_x = None
        if self.distill:
            # The teacher runs first: in backward FSDP gathers ahead of time what ran before, and
            # that has to be the model's own block. A rank without replayed sequences gives the
            # teacher one all the same, because sharded weights are gathered by all ranks together.
            with torch.no_grad():
                teacher_x = self.model.model(input_ids[-max(1, replayed) :], skip=self.new_layers)
                teacher_x = teacher_x[:replayed]
        x = self.model.model(input_ids, documents=documents)
        loss, count = self.cross_entropy(x[:split], targets[:split])
        if teacher_x is None:
            replay_loss, replay_count = self.cross_entropy(x[split:], targets[split:])
        else:
            replay_loss, replay_count = ops.linear_kl(
                x[split:].flatten(0, 1),
                teacher_x.flatten(0, 1),
                self.model.lm_head.weight,
                targets[split:].flatten(),
                self.base_vocab_size,
            )
        return loss + self.weight * replay_loss, count + replay_count


def make_objective(model: LlamaForCausalLM, replay: ReplaySettings) -> NextToken:
    """Returns the objective of these settings; with replay the model is an expanded one."""
    return Replay(model, replay) if replay.is_apart else NextToken(model)
