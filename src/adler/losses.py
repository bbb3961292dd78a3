r"""Loss Hessians: the quadratic form of a loss at the network outputs.

For outputs $F$ and tangents $v$ of the same shape, a `LossHessian` computes

$$
c = v^\top \nabla^2 L(F)\, v
$$

without ever forming a matrix. PyTorch's losses have closed forms, written as sums of squares where
the loss is convex, so that rounding cannot make them negative. Any other criterion is
differentiated twice in output space (`AutogradHessian`), cheap because the network is not involved.

`loss_hessian` finds the provider of a criterion, `register` adds one.

Half-precision outputs, targets and class weights are promoted to float32 first.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from adler.replay import unwrap

__all__ = [
    "AutogradHessian",
    "BCEWithLogitsHessian",
    "CrossEntropyHessian",
    "EmpiricalFisher",
    "GaussianNLLHessian",
    "HuberHessian",
    "LossHessian",
    "MSEHessian",
    "NLLHessian",
    "PoissonNLLHessian",
    "SmoothL1Hessian",
    "loss_hessian",
    "register",
]


class LossHessian(abc.ABC):
    """The quadratic form of a criterion's Hessian with respect to the network outputs.

    Subclass it for a loss of your own, and `register` the subclass.

    Args:
        criterion: The loss, reduced to a scalar.

    Raises:
        ValueError: If the criterion does not reduce.

    Examples:
        >>> class Cosh(torch.nn.Module):
        ...     def forward(self, outputs, targets):
        ...         return (outputs - targets).cosh().sum()
        >>> class CoshHessian(LossHessian):
        ...     def quadratic_form(self, outputs, targets, tangents):
        ...         return ((outputs - targets).cosh() * tangents.square()).sum()
        >>> register(Cosh, CoshHessian)
        >>> type(loss_hessian(Cosh())).__name__
        'CoshHessian'
    """

    def __init__(self, criterion: Callable[..., Tensor]) -> None:
        _refuse_unreduced(criterion)
        self.criterion = criterion

    @abc.abstractmethod
    def quadratic_form(self, outputs: Tensor, targets: Any, tangents: Tensor) -> Tensor:
        """``c = vᵀ ∇²L(F) v``.

        Args:
            outputs: ``F``, what the criterion receives first, ``(b, C)`` or ``(b, C, *D)``.
            targets: What it receives after them; a tuple where it receives several.
            tangents: ``v``, of the shape of ``F``.

        Returns:
            0-dim, float32 or wider.
        """

    def nat(self, outputs: Tensor, targets: Any, value: Tensor) -> Tensor:
        """What one nat an example is worth, in units of the reduced loss.

        Predictions that move by ``v`` diverge, in the sense of Kullback and Leibler and to second
        order, by ``½ vᵀQv / nat`` a nat and example. Infinite where the loss is not known as a
        likelihood.

        Args:
            outputs: As for `quadratic_form`.
            targets: As for `quadratic_form`.
            value: The loss there, 0-dim.

        Returns:
            0-dim.
        """
        return torch.full_like(value, math.inf)

    def example_weights(self, outputs: Tensor, targets: Any) -> Tensor:
        """Factor with which each example's loss enters the reduced one.

        Returns:
            Shape ``(b,)``: an example is an entry of the first dimension. Classification losses
            return ``(b, *D)``: every position is an example.
        """
        b = outputs.shape[0] if outputs.ndim else 1
        factor = 1.0 if getattr(self.criterion, "reduction", "mean") == "sum" else 1.0 / max(b, 1)
        return torch.full((b,), factor, dtype=_wide(outputs.dtype), device=outputs.device)


# --- classification ------------------------------------------------------------------------------


class CrossEntropyHessian(LossHessian):
    r"""Of `torch.nn.CrossEntropyLoss`, with all its options.

    With $p = \mathrm{softmax}(F)$ and $\bar v_i = \sum_c p_{ic} v_{ic}$,

    $$
    c = \sum_i \omega_i \sum_c p_{ic} (v_{ic} - \bar v_i)^2 .
    $$

    The weights hold reduction and targets: $1/b$ for the plain mean, 1 for the sum; with
    class weights $w$, $\omega_i = \sum_c t_{ic} w_c / W$, where $t_i$ is the
    smoothed target distribution and $W$ what PyTorch divides by ($\sum_i w_{y_i}$, or
    ``b`` for probability targets); 0 where the target is ``ignore_index``.

    Examples:
        >>> hessian = CrossEntropyHessian(torch.nn.CrossEntropyLoss())
        >>> outputs, tangents = torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])
        >>> float(hessian.quadratic_form(outputs, torch.tensor([0]), tangents))
        1.0
    """

    def __init__(self, criterion: nn.CrossEntropyLoss | nn.NLLLoss | None = None) -> None:
        super().__init__(nn.CrossEntropyLoss() if criterion is None else criterion)

    def quadratic_form(self, outputs: Tensor, targets: Any, tangents: Tensor) -> Tensor:
        """See the class; targets are class indices ``(b, *D)`` or probabilities ``(b, C, *D)``."""
        F, v = _widen((outputs, tangents))
        axis = _class_axis(F)
        p = F.softmax(axis)
        v = torch.where(p > 0, v, 0)  # a class masked by -inf has no tangent to speak of
        mean = (p * v).sum(axis, keepdim=True)
        q = (p * (v - mean).square()).sum(axis)
        weights = self.example_weights(outputs, targets)
        # An ignored example counts as nothing even where its outputs are not finite.
        return torch.where(weights == 0, 0, weights * q).sum()

    def nat(self, outputs: Tensor, targets: Any, value: Tensor) -> Tensor:
        """``Σ_i ω_i``: 1 for the plain mean."""
        return self.example_weights(outputs, targets).sum()

    def example_weights(self, outputs: Tensor, targets: Any) -> Tensor:
        """``ω``, of the shape of the outputs without their class dimension."""
        criterion: Any = self.criterion
        axis, dtype = _class_axis(outputs), _wide(outputs.dtype)
        classes = outputs.shape[axis]
        smoothing = getattr(criterion, "label_smoothing", 0.0)
        w = None if criterion.weight is None else criterion.weight.to(outputs.device, dtype)
        if targets.is_floating_point():
            t = targets.to(dtype)
            t = t * (1 - smoothing) + smoothing / classes
            weights = t.sum(axis) if w is None else torch.tensordot(t, w, dims=([axis], [0]))
            total = torch.full_like(weights, 1.0).sum()
        else:
            kept = targets != criterion.ignore_index
            y = torch.where(kept, targets, 0)
            # `take`, as indexing waits for the host where y is 0-dim, and takes uint8 for a mask.
            of_class = kept.to(dtype) if w is None else torch.where(kept, w.take(y.long()), 0)
            total = of_class.sum()
            everywhere = classes if w is None else w.sum()
            weights = (1 - smoothing) * of_class
            weights = weights + kept.to(dtype) * (smoothing / classes * everywhere)
        normalised: Tensor = weights if criterion.reduction == "sum" else weights / total
        return normalised


class NLLHessian(CrossEntropyHessian):
    r"""Of `torch.nn.NLLLoss` on log-probabilities.

    The loss is linear in its inputs, so its own Hessian vanishes. What curves is the log-softmax
    before it: the Fisher information of the class distribution, for $F = \log p$,
    $c = \sum_i \omega_i \sum_c p_{ic} (v_{ic} - \bar v_i)^2$. It equals the cross-entropy's
    form on the logits that made the log-probabilities.

    Examples:
        >>> logits, v = torch.tensor([[0.3, -1.0]]), torch.tensor([[1.0, 2.0]])
        >>> y = torch.tensor([1])
        >>> outputs = logits.log_softmax(1)
        >>> tangents = v - (outputs.exp() * v).sum(1, keepdim=True)
        >>> a = NLLHessian(torch.nn.NLLLoss()).quadratic_form(outputs, y, tangents)
        >>> torch.testing.assert_close(a, CrossEntropyHessian().quadratic_form(logits, y, v))
    """

    def __init__(self, criterion: nn.NLLLoss | None = None) -> None:
        super().__init__(nn.NLLLoss() if criterion is None else criterion)


# --- losses that are sums over entries -----------------------------------------------------------


class _ElementwiseHessian(LossHessian):
    """Of a loss that is the mean or sum over entries: a diagonal Hessian."""

    _criterion: ClassVar[type[nn.Module]]

    def __init__(self, criterion: nn.Module | None = None) -> None:
        super().__init__(self._criterion() if criterion is None else criterion)

    @abc.abstractmethod
    def second_derivative(self, outputs: Tensor, *targets: Tensor) -> Tensor | float:
        """Of each entry's loss with respect to the output; broadcasts to the outputs."""

    def quadratic_form(self, outputs: Tensor, targets: Any, tangents: Tensor) -> Tensor:
        """See the class; targets broadcast to the outputs."""
        several = targets if isinstance(targets, tuple) else (targets,)
        F, v, y = _widen((outputs, tangents, several))
        terms = self.second_derivative(F, *y) * v.square()
        # The loss counts the entries of outputs and targets broadcast together.
        terms = terms if terms.shape == y[0].shape else terms + torch.zeros_like(y[0])
        total: Tensor = terms.sum() if self._summed else terms.mean()
        return total

    def nat(self, outputs: Tensor, targets: Any, value: Tensor) -> Tensor:
        """Every entry is an example: their number for a sum, else 1."""
        return torch.full_like(value, float(outputs.numel() if self._summed else 1))

    @property
    def _summed(self) -> bool:
        return getattr(self.criterion, "reduction", "mean") == "sum"


class _RegressionHessian(_ElementwiseHessian):
    """Of a loss that is quadratic around the target, on a scale of its own."""

    def nat(self, outputs: Tensor, targets: Any, value: Tensor) -> Tensor:
        """``2 L``: of a Gaussian whose variance is the mean squared residual of now."""
        return 2 * value


class MSEHessian(_RegressionHessian):
    r"""Of `torch.nn.MSELoss`: $c = \frac{2}{bC} \|v\|^2$, or $2 \|v\|^2$ for the sum.

    Examples:
        >>> F, y, v = torch.zeros(2, 2), torch.ones(2, 2), torch.full((2, 2), 3.0)
        >>> float(MSEHessian(torch.nn.MSELoss()).quadratic_form(F, y, v))
        18.0
    """

    _criterion = nn.MSELoss

    def second_derivative(self, outputs: Tensor, *targets: Tensor) -> Tensor | float:
        """2."""
        return 2.0


class BCEWithLogitsHessian(_ElementwiseHessian):
    r"""Of `torch.nn.BCEWithLogitsLoss`: $w\,(r y + 1 - y)\,\sigma(F)\,\sigma(-F)\,v^2$.

    ``w`` is the criterion's ``weight``, ``r`` its ``pos_weight``. Targets beyond [0, 1] can make it
    negative.

    Examples:
        >>> F, y, v = torch.zeros(4), torch.ones(4), torch.full((4,), 2.0)
        >>> float(BCEWithLogitsHessian(torch.nn.BCEWithLogitsLoss()).quadratic_form(F, y, v))
        1.0
    """

    _criterion = nn.BCEWithLogitsLoss

    def second_derivative(self, outputs: Tensor, *targets: Tensor) -> Tensor | float:
        """See the class."""
        criterion: Any = self.criterion
        (y,) = targets
        s = outputs.sigmoid() * (-outputs).sigmoid()
        if criterion.pos_weight is not None:
            s = s * (criterion.pos_weight.to(outputs) * y + (1 - y))
        return s if criterion.weight is None else s * criterion.weight.to(outputs)


class HuberHessian(_RegressionHessian):
    r"""Of `torch.nn.HuberLoss`: $v^2$ where the residual is below ``delta``.

    Examples:
        >>> F, y, v = torch.tensor([0.5, 9.0]), torch.zeros(2), torch.ones(2)
        >>> float(HuberHessian(torch.nn.HuberLoss()).quadratic_form(F, y, v))
        0.5
    """

    _criterion = nn.HuberLoss

    def second_derivative(self, outputs: Tensor, *targets: Tensor) -> Tensor | float:
        """See the class."""
        delta: float = self.criterion.delta  # type: ignore[attr-defined]
        return ((outputs - targets[0]).abs() < delta).to(outputs)


class SmoothL1Hessian(_RegressionHessian):
    r"""Of `torch.nn.SmoothL1Loss`: $v^2 / \beta$ where the residual is below ``beta``.

    Examples:
        >>> F, y, v = torch.tensor([0.5, 9.0]), torch.zeros(2), torch.ones(2)
        >>> float(SmoothL1Hessian(torch.nn.SmoothL1Loss(beta=2.0)).quadratic_form(F, y, v))
        0.25
    """

    _criterion = nn.SmoothL1Loss

    def second_derivative(self, outputs: Tensor, *targets: Tensor) -> Tensor | float:
        """See the class."""
        beta: float = self.criterion.beta  # type: ignore[attr-defined]
        if beta == 0:
            return 0.0  # the L1 loss
        return ((outputs - targets[0]).abs() < beta).to(outputs) / beta


class PoissonNLLHessian(_ElementwiseHessian):
    r"""Of `torch.nn.PoissonNLLLoss`: $e^F v^2$; on rates, $y (F + \epsilon)^{-2} v^2$.

    Examples:
        >>> F, y, v = torch.zeros(3), torch.ones(3), torch.full((3,), 2.0)
        >>> float(PoissonNLLHessian(torch.nn.PoissonNLLLoss()).quadratic_form(F, y, v))
        4.0
    """

    _criterion = nn.PoissonNLLLoss

    def second_derivative(self, outputs: Tensor, *targets: Tensor) -> Tensor | float:
        """See the class."""
        criterion: Any = self.criterion
        if criterion.log_input:
            return outputs.exp()
        curvature: Tensor = targets[0] / (outputs + criterion.eps).square()
        return curvature


class GaussianNLLHessian(_ElementwiseHessian):
    r"""Of `torch.nn.GaussianNLLLoss` in the mean: $v^2 / \max(\sigma^2, \epsilon)$.

    The targets are ``(target, var)``; the variance is a constant, as what a model predicts reaches
    the criterion through one tensor.

    Examples:
        >>> F, y, v = torch.zeros(3), torch.ones(3), torch.full((3,), 2.0)
        >>> hessian = GaussianNLLHessian(torch.nn.GaussianNLLLoss())
        >>> float(hessian.quadratic_form(F, (y, torch.full((3,), 4.0)), v))
        1.0
    """

    _criterion = nn.GaussianNLLLoss

    def second_derivative(self, outputs: Tensor, *targets: Tensor) -> Tensor | float:
        """See the class."""
        criterion: Any = self.criterion
        var = torch.as_tensor(targets[1], dtype=outputs.dtype, device=outputs.device)
        if var.ndim and var.shape == outputs.shape[:-1]:
            var = var.unsqueeze(-1)  # one variance a row
        return var.clamp(min=criterion.eps).reciprocal()


# --- any loss ------------------------------------------------------------------------------------


class AutogradHessian(LossHessian):
    """Of any criterion that is twice differentiable in its first argument.

    One Hessian-vector product of the loss alone: the network is not involved. Where the loss is not
    convex the result can be negative; the optimizer's rule for that is in `adler.search`.

    Examples:
        >>> hessian = AutogradHessian(lambda outputs, targets: (outputs - targets).pow(4).sum())
        >>> F, y, v = torch.ones(2), torch.zeros(2), torch.tensor([1.0, 2.0])
        >>> float(hessian.quadratic_form(F, y, v))
        60.0
    """

    def quadratic_form(self, outputs: Tensor, targets: Any, tangents: Tensor) -> Tensor:
        """See the class."""
        with torch.enable_grad():
            F, gradient = _output_gradient(self.criterion, outputs, targets, create_graph=True)
            if not gradient.requires_grad:  # linear
                return torch.zeros((), dtype=F.dtype, device=F.device)
            v = tangents.to(F)
            (product,) = torch.autograd.grad(gradient, F, v, materialize_grads=True)
        return (v * product).sum()


class EmpiricalFisher(LossHessian):
    r"""Outer products of the per-example output gradients, in place of the loss Hessian.

    $$
    c = \sum_i \omega_i (\nabla \ell_i^\top v_i)^2
    $$

    with the weights of the criterion's provider, $1/b$ for a plain mean. This is the
    Gauss-Newton baseline of the thesis (ch. 7); in the field's terms BHHH.

    Examples:
        >>> hessian = EmpiricalFisher(torch.nn.MSELoss())
        >>> F, y, v = torch.ones(1, 1), torch.zeros(1, 1), torch.full((1, 1), 3.0)
        >>> float(hessian.quadratic_form(F, y, v))
        36.0
    """

    def __init__(self, criterion: Callable[..., Tensor]) -> None:
        super().__init__(criterion)
        self._provider = loss_hessian(criterion)

    def quadratic_form(self, outputs: Tensor, targets: Any, tangents: Tensor) -> Tensor:
        """See the class."""
        with torch.enable_grad():
            F, gradient = _output_gradient(self.criterion, outputs, targets)
        products = gradient * tangents.to(F)
        weights = self._provider.example_weights(outputs, targets).to(F)
        if weights.ndim == products.ndim - 1:
            slopes = products.sum(_class_axis(products))
        else:
            slopes = products.reshape(weights.numel(), -1).sum(1)
        # The gradient of the reduced loss already holds ω_i once.
        return torch.where(weights == 0, 0, slopes.square() / weights).sum()

    def nat(self, outputs: Tensor, targets: Any, value: Tensor) -> Tensor:
        """That of the criterion."""
        return self._provider.nat(outputs, targets, value)


# --- the registry --------------------------------------------------------------------------------

Provider = Callable[[Any], LossHessian]

_providers: dict[type, Provider | LossHessian] = {
    nn.BCEWithLogitsLoss: BCEWithLogitsHessian,
    nn.CrossEntropyLoss: CrossEntropyHessian,
    nn.GaussianNLLLoss: GaussianNLLHessian,
    nn.HuberLoss: HuberHessian,
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
    _refuse_unreduced(criterion)
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


# --- helpers -------------------------------------------------------------------------------------


def _refuse_unreduced(criterion: object) -> None:
    if getattr(criterion, "reduction", None) == "none":
        raise ValueError(
            "criterion: reduction='none' gives one loss per example, not one to minimise: use "
            "reduction='mean' or 'sum'"
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _widen(tree: Any) -> Any:
    """Half-precision tensors in a tree as float32."""
    return pytree.tree_map_only(
        Tensor, lambda t: t.to(_wide(t.dtype)) if t.is_floating_point() else t, tree
    )


def _class_axis(outputs: Tensor) -> int:
    """Classes are the second dimension, or the only one."""
    return min(1, outputs.ndim - 1)


def _output_gradient(
    criterion: Callable[..., Tensor], outputs: Tensor, targets: Any, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """Outputs as a leaf of at least float32, and the loss's gradient there."""
    several = targets if isinstance(targets, tuple) else (targets,)
    F, several = _widen((outputs.detach(), several))
    F = F.detach().requires_grad_()
    passed = F.clone()  # a criterion may work in place
    on_device = [F.device] if F.device.type == "cuda" else []
    with torch.random.fork_rng(on_device):  # a criterion may draw
        if isinstance(criterion, nn.Module) and F.dtype != outputs.dtype:
            own = dict(itertools.chain(criterion.named_parameters(), criterion.named_buffers()))
            value = functional_call(criterion, _widen(own), (passed, *several))
        else:
            value = criterion(passed, *several)
        if value.ndim != 0:
            raise ValueError(
                f"criterion: it returned shape {tuple(value.shape)}, not a scalar: use "
                "reduction='mean' or 'sum'"
            )
        if not value.requires_grad:
            raise ValueError("criterion: the loss does not depend on the outputs")
        (gradient,) = torch.autograd.grad(value, F, create_graph=create_graph)
    return F, gradient
