"""A loss that the model computes itself, and how to say what it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["ModelLoss"]


def _loss_of(result: Any) -> Any:
    """``result["loss"]`` or ``result.loss``, whichever is there."""
    if isinstance(result, Mapping):
        return result.get("loss")
    return getattr(result, "loss", None)


class ModelLoss:
    r"""The loss inside a model's result, described by the criterion that it equals.

    Takes the criterion's place in the constructor of an optimizer, for models that are called with
    their targets and return their loss:

    $$
    \texttt{loss(result)} = \texttt{factor} \cdot
    \texttt{criterion}(\texttt{outputs(result)}, \texttt{targets(*args, **kwargs)}) .
    $$

    At its first step the optimizer compares the two sides, which waits for the device once.

    Args:
        criterion: The loss as a function of outputs and targets, reduced to a scalar.
        outputs: Maps what the model returns to the tensor that the criterion would receive.
        targets: Maps the arguments of the model's call to the targets, or a tuple of them.
        loss: Maps what the model returns to its loss. Default: ``result["loss"]`` or
            ``result.loss``.

    Raises:
        TypeError: If an argument cannot be called.

    Examples:
        >>> from torch import nn
        >>> import adler
        >>> class Classifier(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body = nn.Linear(4, 3)
        ...     def forward(self, x, labels):
        ...         scores = self.body(x)
        ...         return {"scores": scores, "loss": nn.functional.cross_entropy(scores, labels)}
        >>> model = Classifier()
        >>> loss = adler.ModelLoss(
        ...     nn.CrossEntropyLoss(),
        ...     outputs=lambda result: result["scores"],
        ...     targets=lambda x, labels: labels,
        ... )
        >>> optimizer = adler.Adler(model.parameters(), model, loss)
        >>> model(torch.randn(8, 4), torch.randint(3, (8,)))["loss"].backward()
        >>> optimizer.step()
        >>> bool(optimizer.last_step.skipped)
        False
    """

    def __init__(
        self,
        criterion: Callable[..., Tensor],
        *,
        outputs: Callable[[Any], Tensor],
        targets: Callable[..., Any],
        loss: Callable[[Any], Any] = _loss_of,
    ) -> None:
        given = {"criterion": criterion, "outputs": outputs, "targets": targets, "loss": loss}
        for name, value in given.items():
            if not callable(value):
                raise TypeError(f"{name}: expected a function, got {type(value).__name__}")
        self.criterion, self.outputs, self.targets, self.loss = criterion, outputs, targets, loss

    def factor(
        self, loss: Tensor, outputs: Tensor, targets: tuple[Any, ...], options: Mapping[str, Any]
    ) -> Tensor | None:
        """What the criterion is multiplied by to give the model's loss; to be overridden.

        Args:
            loss: The model's, 0-dim.
            outputs: What the criterion would receive first.
            targets: What it would receive after them.
            options: Keyword arguments of the model's call.

        Returns:
            A 0-dim tensor, computed without a look at its value; None: 1.
        """
        return None

    def check(
        self, loss: Tensor, outputs: Tensor, targets: tuple[Any, ...], factor: Tensor | None
    ) -> bool:
        """Compares the two sides, if they are finite; waits for the device.

        Returns:
            Whether there was anything to compare.

        Raises:
            RuntimeError: If they differ, or the criterion does not take these targets.
        """
        try:
            described = self.criterion(outputs, *targets)
        except Exception as error:
            raise RuntimeError(_not_taken(self.criterion, outputs, targets, error)) from error
        if factor is not None:
            described = factor * described
        ours, theirs = described.to(loss), loss
        if not bool(torch.isfinite(ours) & torch.isfinite(theirs)):
            return False
        # The same numbers, reduced in another order. A shift by one changes them by more.
        tolerance = max(1e-5, 4 * torch.finfo(theirs.dtype).eps)
        if not torch.isclose(ours, theirs, rtol=tolerance, atol=tolerance):
            raise RuntimeError(
                f"step(): the model returned a loss of {float(theirs):.7g}, but criterion(outputs, "
                f"targets) is {float(ours):.7g}: the ModelLoss given to the optimizer describes "
                "another loss. Compare its outputs=, targets= (shifted by one?) and criterion with "
                "what the model does; terms added to the loss cannot be described"
            )
        return True


# --- the message where the criterion raises on what it is given -----------------------------------


def _not_taken(
    criterion: Callable[..., Tensor], outputs: Tensor, targets: tuple[Any, ...], error: Exception
) -> str:
    """What was called, and what to do."""
    name = getattr(criterion, "__name__", type(criterion).__name__)
    lowest = min((int(t.min()) for t in targets if _are_classes(t)), default=0)
    return (
        f"step(): {name}(outputs, targets) of the ModelLoss given to the optimizer raised "
        f"{type(error).__name__}: {str(error).rstrip('.')}. Its outputs= found "
        f"{_in_words(outputs)}, its targets= {', '.join(map(_in_words, targets))}. If the model's "
        "loss ignores an index, so must this criterion "
        f"(ignore_index={lowest if lowest < 0 else ''}); if it flattens, shifts or converts what "
        "it compares, so must outputs= and targets="
    )


def _in_words(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    kind = f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    if _are_classes(value):
        kind += f" from {int(value.min())} to {int(value.max())}"
    return kind


def _are_classes(value: Any) -> bool:
    """Whether these are integers that can be looked at; of a device that failed they cannot."""
    return (
        isinstance(value, Tensor)
        and value.device.type == "cpu"
        and value.numel() > 0
        and not (value.is_floating_point() or value.is_complex())
    )
