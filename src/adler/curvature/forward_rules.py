r"""Forward-mode rules where PyTorch's are slow, or compute otherwise than the training pass did.

A rule takes the arguments of a function of `torch.nn.functional`, tangents with them, and returns
the result with its tangent, or `NotImplemented`, which leaves the case to PyTorch.

Linear maps and attention add up what their arguments contribute without temporaries. Norms and
softmax need no rule of their own beside their gradient: the Jacobian of
$\hat x = (x - \mu(x)) / \sigma(x)$, and that of softmax, are symmetric, so the kernel that pulls a
gradient back also pushes a tangent forward. PyTorch spells both out, operation by operation.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["ForwardRules", "load"]

_HALVES = (torch.float16, torch.bfloat16)

_made: Callable[[Tensor, Any], Tensor] = forward_ad.make_dual
_unpacked: Callable[[Tensor], tuple[Any, Any]] = forward_ad.unpack_dual


@functools.cache
def load() -> None:
    """PyTorch loads its own at first use, with a deprecation warning that users can't heed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


class ForwardRules(TorchFunctionMode):
    """Puts the rules of this module in place of PyTorch's; made outside of `torch.func.jvp`.

    Inside another function transform only those remain that PyTorch can transform once more.

    Args:
        plain: Whether results shall be differentiable backwards too, as only PyTorch's rules are.
        obeys_no_grad: Whether tangents stop where gradients do, under `torch.no_grad`.
    """

    def __init__(self, plain: bool = False, obeys_no_grad: bool = False) -> None:
        super().__init__()
        inside = torch._C._functorch.peek_interpreter_stack() is not None
        self._outermost = not (inside or plain)
        self._obeys_no_grad, self._before = obeys_no_grad, list[bool]()
        self._in_attention = False

    def __enter__(self) -> ForwardRules:
        self._before.append(torch._C._is_fwd_grad_enabled())
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch._C._set_fwd_grad_enabled(self._before.pop())

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled and self._obeys_no_grad:
            func(*args)
            torch._C._set_fwd_grad_enabled(torch.is_grad_enabled())
            return None
        found = NotImplemented
        ours = self._outermost and {*types} <= {Tensor}  # subclasses have their own
        if func is functional.multi_head_attention_forward and ours and not self._in_attention:
            self._in_attention = True  # if it comes here once more, it is PyTorch's
            try:
                with self:
                    return _multi_head_attention(*args, **kwargs)
            finally:
                self._in_attention = False
        if func in _RULES and ours:
            with contextlib.suppress(NotImplementedError):  # a kernel that the device lacks
                found = _RULES[func](*args, **kwargs)
        if func in _REPAIRS and found is NotImplemented:
            found = _REPAIRS[func](*args, **kwargs)
        return func(*args, **kwargs) if found is NotImplemented else found


def _not_asking(function: Any) -> Any:
    """A copy without the check for an override, so that a mode sees the calls inside it."""
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_multi_head_attention = _not_asking(functional.multi_head_attention_forward)

# --- rules ---------------------------------------------------------------------------------------


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    (x, dx), (w, dw), (b, db) = _dual(input), _dual(weight), _dual(bias)
    if dx is None and dw is None:
        return NotImplemented
    y = functional.linear(x, w, b)
    # Autocast leaves operations in place alone.
    cast: Any = (t if t is None else t.to(y.dtype) for t in (x, dx, w, dw, db))
    x, dx, w, dw, db = cast
    if dw is None:
        return _made(y, functional.linear(dx, w, db))
    dy = functional.linear(x, dw, db)
    if dx is not None:
        dy.view(-1, dy.shape[-1]).addmm_(dx.reshape(-1, dx.shape[-1]), w.t())
    return _made(y, dy)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not training:
        return NotImplemented
    (x, dx), (w, dw), (b, db) = _of_a_norm(input, weight, bias)
    if dx is None and dw is None:
        return NotImplemented
    # Without running statistics: a replay's are not read.
    y, mean, rstd = torch.native_batch_norm(x, w, b, None, None, True, momentum, eps)
    dy: Any = None
    if dx is not None:
        dy, _, _ = torch.ops.aten.native_batch_norm_backward(
            dx, x, w, None, None, mean, rstd, True, eps, [True, False, False]
        )
    if dw is not None:
        channels = [1, -1, *[1] * (x.ndim - 2)]
        # x̂ ẇ + ḃ without x̂.
        slope = dw * rstd
        offset = (-slope * mean if db is None else db - slope * mean).view(channels)
        slope = slope.view(channels)
        dy = torch.addcmul(offset, x, slope) if dy is None else dy.addcmul_(x, slope).add_(offset)
    return _made(y.to(input.dtype), dy.to(input.dtype))


def _layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    (x, dx), (w, dw), (b, db) = _of_a_norm(input, weight, bias)
    if dx is None and dw is None:
        return NotImplemented
    y, mean, rstd = torch.native_layer_norm(x, normalized_shape, w, b, eps)
    # A norm is linear in weight and bias.
    dy = None if dw is None else functional.layer_norm(x, normalized_shape, dw, db, eps)
    if dx is not None:
        pushed, _, _ = torch.ops.aten.native_layer_norm_backward(
            dx, x, normalized_shape, mean, rstd, None, None, [True, False, False]
        )
        dy = _plus_weighted(dy, pushed, w)
    return _made_by_a_norm(input, y, dy)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    (x, dx), (w, dw), (b, db) = _of_a_norm(input, weight, bias)
    if dx is None and dw is None:
        return NotImplemented
    x = x.contiguous()
    n, channels = x.shape[:2]
    sizes = (n, channels, x[0, 0].numel(), num_groups)
    y, mean, rstd = torch.native_group_norm(x, w, b, *sizes, eps)
    dy = None if dw is None else functional.group_norm(x, num_groups, dw, db, eps)
    if dx is not None:
        pushed, _, _ = torch.ops.aten.native_group_norm_backward(
            dx.contiguous(), x, mean, rstd, None, *sizes, [True, False, False]
        )
        per_channel = None if w is None else w.view(-1, *[1] * (x.ndim - 2))
        dy = _plus_weighted(dy, pushed, per_channel)
    return _made_by_a_norm(input, y, dy)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    device = query.device.type
    if enable_gqa:
        heads = query.shape[-3]
        key, value = (t.repeat_interleave(heads // t.shape[-3], -3) for t in (key, value))
    pairs = (query, key, value)
    if all(_dual(t)[1] is None for t in pairs) or len({t.shape[:-2] for t in pairs}) > 1:
        return NotImplemented
    if attn_mask is not None and (is_causal or _dual(attn_mask)[1] is not None):
        return NotImplemented
    if dropout_p and device != "cpu":
        return NotImplemented
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else query.dtype
    # The kernels of halves add up in float32.
    with _no_autocast(device):
        (q, dq), (k, dk), (v, dv) = (map(_flat, _wide(each)) for each in pairs)
        k, dk = k.mT, None if dk is None else dk.mT
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        scores = _products((q, k), scale=factor)
        weights = _attended(scores, query.shape[:-2], attn_mask, is_causal)
        moved = _products((dq, k), (q, dk), scale=factor)
        if moved is not None:
            moved = torch._softmax_backward_data(moved, weights, -1, weights.dtype)
        if dropout_p:
            kept = functional.dropout(torch.ones_like(weights), dropout_p)
            weights, moved = weights * kept, moved if moved is None else moved * kept
        y, dy = _products((weights, v)), _products((moved, v), (weights, dv))
        shape = (*query.shape[:-1], v.shape[-1])
        return _made(y.view(shape).to(dtype), dy.view(shape).to(dtype))


# --- helpers of rules ----------------------------------------------------------------------------


def _dual(tensor: Tensor | None) -> tuple[Any, Any]:
    """What a tensor is, and its tangent; either may be None."""
    return (None, None) if tensor is None else _unpacked(tensor)


def _wide(tensor: Tensor | None) -> tuple[Any, Any]:
    """As `_dual`; halves in float32."""
    if tensor is None:
        return None, None
    return _dual(tensor.float() if tensor.dtype in _HALVES else tensor)


def _of_a_norm(*arguments: Tensor | None) -> tuple[tuple[Any, Any], ...]:
    """As `_wide`, of input, weight and bias; with the bias the weight moves, if only by zero."""
    x, (w, dw), (b, db) = map(_wide, arguments)
    return x, (w, torch.zeros_like(db) if dw is None and db is not None else dw), (b, db)


def _plus_weighted(total: Tensor | None, tangent: Tensor, weight: Tensor | None) -> Tensor:
    """Of new tensors."""
    if total is None:
        return tangent if weight is None else tangent.mul_(weight)
    return total.add_(tangent) if weight is None else total.addcmul_(tangent, weight)


def _made_by_a_norm(input: Tensor, y: Tensor, dy: Any) -> Tensor:
    """In the dtype of the training pass: an accelerator's autocast leaves these in float32."""
    device = input.device.type
    if device != "cpu" and torch.is_autocast_enabled(device):
        return _made(y, dy)
    return _made(y.to(input.dtype), dy.to(input.dtype))


def _flat(tensor: Tensor | None) -> Any:
    """As a batch of matrices."""
    return None if tensor is None else tensor.reshape(-1, *tensor.shape[-2:])


def _products(*pairs: tuple[Tensor | None, Tensor | None], scale: float = 1.0) -> Any:
    """Sum of the products of two batches of matrices, times ``scale``; without pairs, None."""
    total = None
    for a, b in pairs:
        if a is None or b is None:
            continue
        if total is None:
            total = torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)
        else:
            total.baddbmm_(a, b, alpha=scale)
    return total


def _attended(scores: Tensor, batch: torch.Size, mask: Tensor | None, causal: bool) -> Tensor:
    """How much each query attends to each key, as a batch of matrices."""
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril_()
    if mask is None:
        return scores.softmax(-1)
    scores = scores.view(*batch, *scores.shape[-2:])
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1)
    if not causal:  # everything may be hidden from some
        weights = weights.masked_fill(scores.isneginf().all(-1, keepdim=True), 0)
    return weights.view(-1, *scores.shape[-2:])


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


# --- repairs: as in training ---------------------------------------------------------------------


def _in_float32(norm: Callable[..., Tensor]) -> Callable[..., Any]:
    """Under autocast a norm's tangent stays in float32 beside an output in half precision.

    A convolution refuses that. Inside, kernels of norms compute in float32 anyway.
    """

    def rule(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        others = pytree.tree_leaves((args, kwargs))
        if input.dtype not in _HALVES or not any(
            isinstance(other, Tensor) and other.dtype == torch.float32 for other in others
        ):
            return NotImplemented
        return norm(input.float(), *args, **kwargs).to(input.dtype)

    return rule


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return _dropped(input, p, training, inplace, lambda kept: (kept / (1 - p), 0.0))


def _alpha_dropout(
    input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Any:
    """G. Klambauer et al., arXiv 1706.02515."""
    low = 1.7580993408473766  # minus what SELU is far below zero

    def terms(kept: Tensor) -> tuple[Tensor, Tensor]:
        scale = ((low**2 * p + 1) * (1 - p)) ** -0.5
        return kept * scale, (kept - 1) * (low * scale) + low * scale * p

    return _dropped(input, p, training, inplace, terms)


def _dropped(
    x: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    terms: Callable[[Tensor], tuple[Tensor, Tensor | float]],
) -> Any:
    """On the CPU PyTorch's rule draws the mask in the order of the shape, not of the memory.

    Args:
        x: What some entries of are dropped.
        p: The probability of that.
        training: Whether any are.
        inplace: Whether ``x`` is overwritten.
        terms: From the mask, 1 for what is kept, to factor and offset.
    """
    if x.device.type != "cpu" or not training or not 0 < p < 1:
        return NotImplemented
    factor, offset = terms(torch.empty_like(x).bernoulli_(1 - p))
    return x.mul_(factor).add_(offset) if inplace else x * factor + offset


_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.linear: _linear,
    functional.batch_norm: _batch_norm,
    functional.layer_norm: _layer_norm,
    functional.group_norm: _group_norm,
    functional.scaled_dot_product_attention: _attention,
}
_REPAIRS: dict[Callable[..., Any], Callable[..., Any]] = {
    **{
        getattr(module, name): _in_float32(getattr(module, name))
        for module in (torch, functional)
        for name in ("batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm")
        if hasattr(module, name)
    },
    functional.dropout: _dropout,
    torch.dropout: _dropout,
    functional.alpha_dropout: _alpha_dropout,
    torch.alpha_dropout: _alpha_dropout,
}
