"""The losses that training minimises. An objective holds the model and is the root of FSDP.

`NextToken` is the ordinary loss. `Replay` gives the sequences of general text a loss of their own,
so that the model does not forget. `Hold` is told how much may be forgotten, and finds the weight of
that loss by itself.

Shapes: B sequences of T tokens, C hidden size.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llamapro import ops
from llamapro.model import LlamaForCausalLM
from llamapro.training.settings import ReplaySettings


class NextToken(nn.Module):
    """Cross-entropy of the next token, summed."""

    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = model

    def adapt(self, relative_rate: float) -> None:
        """Follows an optimizer step, on every rank; `relative_rate` is a share of the peak rate."""

    @property
    def control(self) -> dict[str, float | None]:
        """Numbers that a resumed run needs besides weights and moments."""
        return {}

    def resume(self, control: dict[str, float | None]) -> None:
        """Continues from an earlier `control`."""

    def own_loss(self, loss: Tensor) -> Tensor:
        """Returns the part of the last micro-batch's loss that is not of replayed sequences."""
        return loss

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

    Without distillation their loss is cross-entropy. With it the base is the teacher (Hinton et
    al., 2015), and the loss is KL(base || model) per token: Li & Hoiem's "Learning without
    Forgetting" (2016) with no second set of weights, because an expanded model without its new
    blocks *is* its base.
    """

    def __init__(self, model: LlamaForCausalLM, replay: ReplaySettings):
        super().__init__(model)
        self.weight: float | Tensor = replay.weight
        self.distill = replay.distill
        self._own_loss = torch.zeros(())
        record = model.config.expansion
        assert record is not None  # `checks.check` refuses replay where every weight trains
        self.new_layers, self.base_vocab_size = record.new_layers, record.base_vocab_size

    def own_loss(self, loss: Tensor) -> Tensor:
        """As `NextToken.own_loss`: the domain's loss alone."""
        return self._own_loss

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor,
        documents: Tensor | None = None,
        replayed: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `NextToken.forward`; both results include the replayed sequences, which come last."""
        if replayed is None:
            return self.combine(super().forward(input_ids, targets, documents), None)
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
        return self.combine((loss, count), (replay_loss, replay_count))

    def combine(
        self, losses: tuple[Tensor, Tensor], replayed: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Joins loss sum and number of targets of the domain's sequences with those of replay."""
        self._own_loss = losses[0].detach()
        if replayed is None:
            return losses
        return losses[0] + self.weight * replayed[0], losses[1] + replayed[1]


class Hold(Replay):
    """Distillation that lets the model forget as much as the user allows, and no more.

    Minimise the domain's loss subject to KL(base || model) <= allowed. The weight is the Lagrange
    multiplier of that constraint, so nobody has to search for it. It falls while the KL of the
    replayed tokens is under `allowed`, rises while it is over `most`, and rests in between. The
    rule is a proportional-integral one, in logarithms because useful weights span orders of
    magnitude (Stooke et al., "Responsive Safety in Reinforcement Learning by PID Lagrangian
    Methods", 2020):

        allowed = hold, in nats per token, or hold * (the fall of the domain's loss since step 1)
        most = allowed * (1 + EXCESS * learning rate / its peak)
        e = log(KL / allowed) under allowed, log(KL / most) over most, else 0; clipped
        I = I + INTEGRAL * e
        weight = exp(I + PROPORTIONAL * e)

    KL and loss are moving averages over steps, that of the KL a geometric one. A high learning rate
    keeps the weights in motion, which costs KL that vanishes when the rate falls: with no more than
    the bound the rule would fight this noise instead of the forgetting.

    The rule runs on the device in fp64, on sums over all ranks. So no step waits for it, and all
    ranks have the same weight.
    """

    INTEGRAL, PROPORTIONAL, EXCESS = 0.05, 0.5, 4.0
    DOWN, UP = -0.5, 1.0  # bounds of e: the weight rises faster than it falls
    MEMORY = 0.8  # of the moving averages, per step
    LEAST = 1e-3  # nats per token that a share allows before anything is learned
    ZERO = 1e-6  # a KL below this counts as this
    FIRST, LOWEST, HIGHEST = 3.0, 0.1, 100.0  # weights

    def __init__(self, model: LlamaForCausalLM, replay: ReplaySettings):
        super().__init__(model, replay)
        self.hold, self.is_relative = replay.held
        self._measured = torch.zeros(2, 2, dtype=torch.float64)  # sums and tokens of this step
        self.resume(
            {
                "log_weight": math.log(self.FIRST),  # I
                "kl": None,  # moving average, as the loss
                "loss": None,
                "first_loss": None,  # that of the first step
                "steps_at_bound": 0.0,  # in a row with the weight at HIGHEST
                "weight": self.FIRST,
            }
        )

    def resume(self, control: dict[str, float | None]) -> None:
        """Continues from an earlier `control`; a new run has none."""
        if control:  # NaN stands for a number that is not known yet: the device has no None
            numbers = {k: math.nan if value is None else value for k, value in control.items()}
            self._state = {k: torch.tensor(n, dtype=torch.float64) for k, n in numbers.items()}

    @property
    def control(self) -> dict[str, float | None]:
        """The rule's numbers by name, None before they are known; waits for the device."""
        numbers = torch.stack(list(self._state.values())).tolist()
        values = (None if math.isnan(number) else number for number in numbers)
        return dict(zip(self._state, values, strict=True))

    def combine(
        self, losses: tuple[Tensor, Tensor], replayed: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """As `Replay.combine`; notes losses and tokens for `adapt`."""
        device = losses[0].device
        self._state = {name: number.to(device) for name, number in self._state.items()}
        self._measured = self._measured.to(device)
        if torch.is_grad_enabled():
            zero = torch.zeros_like(losses[0])
            sums = torch.stack([*(replayed or (zero, zero)), *losses]).detach()
            self._measured += sums.double().view(2, 2)
        self.weight = self._state["weight"].to(losses[0].dtype)
        return super().combine(losses, replayed)

    def adapt(self, relative_rate: float) -> None:
        """Moves the weight after an optimizer step; every rank must call it."""
        total, self._measured = self._measured, torch.zeros_like(self._measured)
        dist.all_reduce(total)
        kl, loss = total[:, 0] / total[:, 1]  # NaN where the step had no such tokens
        self._average(kl, loss)
        self._move(self._bound(), relative_rate)

    def _average(self, kl: Tensor, loss: Tensor) -> None:
        """Adds this step's KL and loss, where finite, to their moving averages, or begins these."""
        state = self._state
        for name, value in (("kl", kl), ("first_loss", loss), ("loss", loss)):
            is_first = state[name].isnan() & value.isfinite()
            state[name] = torch.where(is_first, value, state[name])
        log_kl, log_average = (x.clamp(min=self.ZERO).log() for x in (kl, state["kl"]))
        geometric = torch.lerp(log_kl, log_average, self.MEMORY).exp()
        state["kl"] = torch.where(kl.isfinite(), geometric, state["kl"])
        arithmetic = torch.lerp(loss, state["loss"], self.MEMORY)
        state["loss"] = torch.where(loss.isfinite(), arithmetic, state["loss"])

    def _bound(self) -> Tensor | float:
        """Returns the KL that is allowed after this step, in nats per token."""
        if not self.is_relative:
            return self.hold
        learned = self._state["first_loss"] - self._state["loss"]
        return (self.hold * learned).clamp(min=self.LEAST)

    def _move(self, bound: Tensor | float, relative_rate: float) -> None:
        """Sets I and the weight by the class's rule."""
        state, lowest, highest = self._state, math.log(self.LOWEST), math.log(self.HIGHEST)
        under = (state["kl"] / bound).log()  # negative under the bound
        over = under - math.log(1 + self.EXCESS * relative_rate)  # positive over `most`
        # At most one of the two clamped values is not 0. Both are NaN before a KL is known.
        error = (under.clamp(self.DOWN, 0) + over.clamp(0, self.UP)).nan_to_num()
        integral = (state["log_weight"] + self.INTEGRAL * error).clamp(lowest, highest)
        log_weight = (integral + self.PROPORTIONAL * error).clamp(lowest, highest)
        steps = torch.where(log_weight >= highest, state["steps_at_bound"] + 1, 0.0)
        state |= {"log_weight": integral, "weight": log_weight.exp(), "steps_at_bound": steps}


def allowed(replay: ReplaySettings, control: dict[str, float | None]) -> float:
    """Returns the KL, in nats per token, that `replay.hold` allows where `control` stands."""
    hold, is_relative = replay.held
    learned = (control["first_loss"] or 0.0) - (control["loss"] or 0.0)
    return max(Hold.LEAST, hold * learned) if is_relative else hold


def make_objective(model: LlamaForCausalLM, replay: ReplaySettings) -> NextToken:
    """Returns the objective of these settings; with replay the model is an expanded one."""
    if not replay.is_apart:
        return NextToken(model)
    return Hold(model, replay) if replay.hold else Replay(model, replay)
