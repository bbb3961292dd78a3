"""Which loss Hessian belongs to which criterion."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import nn

from adler._unwrap import unwrap
from adler.losses.base import LossHessian, refuse_unreduced
from adler.losses.classification import CrossEntropyHessian, NLLHessian
from adler.losses.entrywise import (
    BCEWithLogitsHessian,
    GaussianNLLHessian,
    HuberHessian,
    MSEHessian,
    PoissonNLLHessian,
    SmoothL1Hessian,
)
from adler.losses.generic import AutogradHessian
from adler.losses.sequences import CTCHessian, KLDivHessian

__all__ = ["loss_hessian", "register"]

Provider = Callable[[Any], LossHessian]

_providers: dict[type, Provider | LossHessian] = {
    nn.BCEWithLogitsLoss: BCEWithLogitsHessian,
    nn.CTCLoss: CTCHessian,
    nn.CrossEntropyLoss: CrossEntropyHessian,
    nn.GaussianNLLLoss: GaussianNLLHessian,
    nn.HuberLoss: HuberHessian,
    nn.KLDivLoss: KLDivHessian,
    nn.MSELoss: MSEHessian,
    nn.NLLLoss: NLLHessian,
    nn.PoissonNLLLoss: PoissonNLLHessian,
    nn.SmoothL1Loss: SmoothL1Hessian,
}


# With their default arguments, as the optimizer calls them.
_functions: dict[Any, Callable[[], LossHessian]] = {
    nn.functional.binary_cross_entropy_with_logits: BCEWithLogitsHessian,
    nn.functional.cross_entropy: CrossEntropyHessian,
    nn.functional.huber_loss: HuberHessian,
    nn.functional.mse_loss: MSEHessian,
    nn.functional.nll_loss: NLLHessian,
    nn.functional.smooth_l1_loss: SmoothL1Hessian,
}


def register(loss_class: type, provider: Provider | LossHessian) -> None:
    """Makes `loss_hessian` use ``provider`` for criteria of a class, in place of any before.

    Args:
        loss_class: Class of the criterion. Subclasses count if they inherit its ``forward``.
        provider: A `LossHessian` subclass, or a function from the criterion to a `LossHessian`;
            or one `LossHessian` for all criteria of the class.

    Raises:
        TypeError: If the arguments are of another kind.
    """
    if not isinstance(loss_class, type):
        raise TypeError(f"loss_class: expected a class, got {loss_class!r}")
    if not callable(provider) and not isinstance(provider, LossHessian):
        raise TypeError(f"provider: expected a LossHessian or what makes one, got {provider!r}")
    _providers[loss_class] = provider


def loss_hessian(criterion: Any) -> LossHessian:
    """The provider for a criterion: registered, else by autograd.

    A subclass that overrides ``forward`` computes another loss, so its parent's closed form does
    not apply to it.

    Args:
        criterion: The loss, or a `LossHessian`, which is returned as it is.

    Raises:
        ValueError: If the criterion does not reduce.
        TypeError: If the criterion cannot be called, or a registered provider makes something else.
    """
    if isinstance(criterion, LossHessian):
        return criterion
    if not callable(criterion):
        raise TypeError(f"criterion: expected a loss, got {type(criterion).__name__}")
    if isinstance(criterion, nn.Module):
        criterion = unwrap(criterion)
    refuse_unreduced(criterion)
    if isinstance(criterion, Hashable) and criterion in _functions:
        return _functions[criterion]()
    computes = "forward" if isinstance(criterion, nn.Module) else "__call__"
    own = getattr(type(criterion), computes)
    for parent in type(criterion).__mro__:
        if parent in _providers and getattr(parent, computes, None) is own:
            provider = _providers[parent]
            made = provider if isinstance(provider, LossHessian) else provider(criterion)
            if not isinstance(made, LossHessian):
                raise TypeError(
                    f"the provider registered for {parent.__name__} made "
                    f"{type(made).__name__}, not a LossHessian"
                )
            return made
    return AutogradHessian(criterion)
