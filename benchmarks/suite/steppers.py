"""What stands between the backward pass and the next batch: one class for each kind of method.

The loop is the same for all: gradients are zeroed, the loss is computed and backpropagated, and
`Stepper.after_backward` does the rest. What is evaluated is not always what is trained.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = [
    "Averaged",
    "Parabola",
    "ScheduleFree",
    "ScheduleFreeTakesLoss",
    "Setting",
    "Stepper",
    "TakesLoss",
    "warmup",
    "warmup_cosine",
]

_BATCH_NORM_BATCHES = 50  # Schedule-Free's README


@dataclass(frozen=True)
class Setting:
    """All that a method may know of a run.

    Attributes:
        model: To be trained.
        criterion: Its loss.
        rate: The learning rate of a tuned method; NaN for the others.
        steps: Of the whole run, for methods that must know it (`Method.needs_steps`).
        epoch_steps: Of one epoch.
        batches: Begins an endless stream of minibatches of the training set, in an order of their
            own: for methods that look at others than the one they step on.
    """

    model: nn.Module
    criterion: nn.Module
    rate: float
    steps: int
    epoch_steps: int
    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]

    @property
    def has_batch_norm(self) -> bool:
        """Whether the network has running statistics."""
        return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.model.modules())


class Stepper:
    """Steps with an optimizer, and with a schedule's multiplier of its rate if there is one.

    Args:
        setting: The run.
        optimizer: Of the run's model.
        schedule: Maps the number of the step, from 0, to a multiplier of the rate.
        rate: Reads the rate of the last step for the record; by default ``effective_lr`` or else
            ``lr`` of the first group.
    """

    def __init__(
        self,
        setting: Setting,
        optimizer: Optimizer,
        schedule: Callable[[int], float] | None = None,
        rate: Callable[[Optimizer], float] | None = None,
    ) -> None:
        self.setting, self.optimizer, self._rate = setting, optimizer, rate
        self._schedule = None if schedule is None else LambdaLR(optimizer, schedule)

    def train(self) -> None:
        """Before an epoch."""
        self.setting.model.train()

    def after_backward(self, loss: Tensor) -> None:
        """Takes the step."""
        self._step(loss)
        if self._schedule is not None:
            self._schedule.step()

    def _step(self, loss: Tensor) -> None:
        self.optimizer.step()

    def rate(self) -> float:
        """Of the last step; NaN where the method does not tell."""
        if self._rate is not None:
            return self._rate(self.optimizer)
        group = self.optimizer.param_groups[0]
        return float(group.get("effective_lr", group["lr"]))

    def evaluate(self) -> nn.Module:
        """The model to be tested, in eval mode. `train` is called before the next step."""
        return self.setting.model.eval()

    def counts(self) -> dict[str, int | None]:
        """Steps skipped and steps clipped, for an optimizer that counts them."""
        last = getattr(self.optimizer, "last_step", None)
        return {
            name: None if last is None else int(getattr(last, f"{name}_total"))
            for name in ("skipped", "clipped")
        }


class TakesLoss(Stepper):
    """MoMo: the step needs the loss's value."""

    def _step(self, loss: Tensor) -> None:
        step: Callable[..., Any] = self.optimizer.step
        step(loss=loss.detach())


class ScheduleFree(Stepper):
    """Schedule-Free: trained at one point, tested at the average of others.

    The running statistics of BatchNorm belong to the former; as the authors advise, they are made
    anew at the latter, by minibatches in train mode, before every test.
    """

    def train(self) -> None:
        """Puts the weights back where gradients are taken."""
        super().train()
        self._switch("train")

    def evaluate(self) -> nn.Module:
        """Puts the average in place of the weights."""
        self._switch("eval")
        model = self.setting.model
        if self.setting.has_batch_norm:
            model.train()
            wanted = min(_BATCH_NORM_BATCHES, self.setting.epoch_steps)
            with torch.no_grad():
                for x, _ in itertools.islice(self.setting.batches(), wanted):
                    model(x)
        return model.eval()

    def _switch(self, mode: str) -> None:
        getattr(self.optimizer, mode)()


class ScheduleFreeTakesLoss(TakesLoss, ScheduleFree):
    """ScheduleFree+: both of these."""


class Averaged(Stepper):
    """DoG: a running average of the weights, which is what is tested.

    Args:
        setting: The run.
        optimizer: Of the run's model.
        averager: Has ``step()``, called after each step, and ``averaged_model``.
        rate: See `Stepper`.

    Raises:
        FloatingPointError: From `after_backward`, where the gradient is no longer finite.
    """

    def __init__(
        self,
        setting: Setting,
        optimizer: Optimizer,
        averager: Any,
        rate: Callable[[Optimizer], float] | None = None,
    ) -> None:
        super().__init__(setting, optimizer, rate=rate)
        self._averager = averager

    def _step(self, loss: Tensor) -> None:
        try:
            self.optimizer.step()
        except AssertionError as error:  # the sum of squared gradients is NaN
            raise FloatingPointError(str(error)) from error
        self._averager.step()

    def evaluate(self) -> nn.Module:
        """The average."""
        averaged: nn.Module = self._averager.averaged_model
        return averaged.eval()


class Parabola(Stepper):
    """GeN: every so many steps a parabola through three losses on another minibatch.

    Args:
        setting: The run.
        optimizer: Of the run's model.
        fit: The package's ``lr_parabola``.
        every: Steps between two fits.
    """

    def __init__(
        self, setting: Setting, optimizer: Optimizer, fit: Callable[..., None], every: int
    ) -> None:
        super().__init__(setting, optimizer)
        self._fit, self._every = fit, every
        self._stream, self._done = setting.batches(), 0
        self._device = next(setting.model.parameters()).device

    def _step(self, loss: Tensor) -> None:
        self._done += 1
        if self._done % self._every == 0:
            # A fit that fails is printed, and the rate is halved.
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                self._fit(
                    self.setting.model,
                    self.optimizer,
                    self.setting.criterion,
                    tr_iter=self._stream,
                    device=self._device,
                    task="image_cls",  # model(x), criterion(outputs, y): true of all our tasks
                )
        self.optimizer.step()


def warmup(steps: int) -> Callable[[int], float]:
    """Linear over so many steps, then one.

    Examples:
        >>> schedule = warmup(steps=4)
        >>> [schedule(step) for step in (0, 1, 3, 9)]
        [0.25, 0.5, 1.0, 1.0]
    """
    return lambda step: min(1.0, (step + 1) / steps)


def warmup_cosine(steps: int, warmup: float) -> Callable[[int], float]:
    """Linear over the first part of the steps, then a half cosine to zero.

    Args:
        steps: Of the whole run.
        warmup: A fraction of them; 0 for none.

    Examples:
        >>> schedule = warmup_cosine(steps=100, warmup=0.2)
        >>> [round(schedule(step), 3) for step in (0, 19, 60, 100)]
        [0.05, 1.0, 0.5, 0.0]
    """
    rising = int(warmup * steps)

    def multiplier(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2

    return multiplier
