"""What a loop is told whose first step has no loss to measure: what to write, as code.

Of a model that returns its loss, a `ModelLoss`; of one that returns several tensors, a criterion
that receives them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from adler._recording.replay import not_a_tensor

__all__ = ["how_to_describe", "of_several", "terms_in"]

_TARGETS = ("labels", "label", "targets", "target", "y", "tgt")
_STARS: dict[Any, str] = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}


def how_to_describe(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
) -> str | None:
    """The line to write for a model that returns its loss; None: it seems to return none.

    A scalar is its loss where it is called so, or the model was given targets. Otherwise it may be
    a term that the loop adds to its own.

    Args:
        model: That was called.
        args: With these.
        kwargs: And these.
        result: What it returned.

    Examples:
        >>> import torch
        >>> class Bigram(nn.Module):
        ...     def forward(self, tokens, targets=None):
        ...         pass
        >>> tokens, scores = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, 7)
        >>> loss = torch.zeros((), requires_grad=True)
        >>> line = how_to_describe(Bigram(), (tokens, tokens), {}, (scores, loss))
        >>> "targets=lambda tokens, targets: targets.flatten()" in line
        True
    """
    found = list(_parts(result))
    losses = terms_in(result)
    if not losses:
        return None
    outputs = [(place, t) for place, t in found if t.ndim > 0 and t.is_floating_point()]
    if not outputs:
        return (
            "the model returned a loss, and not the outputs that it is a function of: have it "
            "return both, and describe the loss by adler.ModelLoss(criterion, outputs=..., "
            "targets=..., loss=...) in the criterion's place"
        )
    place, scores = outputs[0]
    called_so = losses[0] in ("result['loss']", "result.loss")
    names, fits = _targets(model, args, kwargs, scores, called_so)
    name = next((name for name in _TARGETS if name in fits), next(reversed(fits), None))
    if name is None and not called_so and not set(names) & set(_TARGETS):
        return None
    targets, note = f"lambda {', '.join(names)}: {name}", ""
    if name is None:
        targets = "targets_of"
        note = (
            f"\nwhere targets_of({', '.join(names)}) is to be written: it returns the targets that "
            "the model's criterion receives.\n"
        )
    elif fits[name] == "flat":
        targets += ".flatten()"
        place += ".flatten(0, -2)" if scores.ndim > 2 else ""
    return (
        "the model returned its loss, which the criterion given to the optimizer did not compute. "
        "Give the optimizer a description of it in the criterion's place (compare it with what "
        "the model does; it is checked at the first step):\n\n"
        f"    adler.ModelLoss(criterion, outputs=lambda result: {place}, targets={targets}, "
        f"loss=lambda result: {losses[0]})\n{note}"
        "\nIf that scalar is only a term that the loop adds to its own loss, give the optimizer a "
        "module that computes the whole from what the model returned, and call it in the loop"
    )


def terms_in(result: Any) -> list[str]:
    """Where the differentiable scalars are in what a model returned.

    Examples:
        >>> import torch
        >>> terms_in((torch.zeros(2, 3), torch.zeros((), requires_grad=True)))
        ['result[1]']
    """
    return [place for place, t in _parts(result) if t.ndim == 0 and t.requires_grad]


def _parts(result: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in what a model returns, and how a function of ``result`` finds each."""
    if isinstance(result, Tensor):
        yield "result", result
        return
    if isinstance(result, Mapping):
        named = [(f"result[{key!r}]", value) for key, value in result.items()]
    elif isinstance(result, (tuple, list)):
        named = [(f"result[{i}]", value) for i, value in enumerate(result)]
    else:
        named = [(f"result.{key}", value) for key, value in getattr(result, "__dict__", {}).items()]
    yield from ((place, value) for place, value in named if isinstance(value, Tensor))


def _targets(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    scores: Tensor,
    called_so: bool,
) -> tuple[list[str], dict[str, str]]:
    """The model's arguments as a function takes them, and how those fit that may be targets.

    The first tensor is the input, unless its name or that of the loss says otherwise.
    """
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return ["*args", "**kwargs"], {}
    given, known = bound.arguments, bound.signature.parameters
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    first = next(iter(tensors), None)
    fits = {
        name: _shape(value, scores)
        for name, value in tensors.items()
        if called_so or name != first or name in _TARGETS
    }
    names = [_STARS.get(known[name].kind, "") + name for name in given]
    return names, {name: shape for name, shape in fits.items() if shape is not None}


def _shape(value: Tensor, scores: Tensor) -> str | None:
    """How a tensor fits outputs as their targets; None: it does not."""
    if value.is_floating_point():
        return "alike" if value.shape == scores.shape else None
    if value.shape == scores.shape[:-1]:
        return "flat" if scores.ndim > 2 else "classes"
    return "classes" if value.shape == scores.shape[:1] + scores.shape[2:] else None


def of_several(criterion: Any, result: Any) -> str:
    """The message where the model returns no tensor, and no call of the criterion was seen."""
    kind, module = type(result).__name__, isinstance(criterion, nn.Module)
    term, name = next(iter(terms_in(result)), None), _name_of(criterion)
    before = "" if name else "    loss_of = criterion\n\n"
    if term is not None and _takes_two(criterion):
        called = (
            "was not called on any of it" if module else "is a function, whose calls no hook sees"
        )
        return (
            f"the model returned {kind} with a scalar, {term}, and the criterion {called}. If "
            "the loop adds that scalar to its loss, make a module that computes the whole loss "
            "from what the model returned, give it to the optimizer and call it in the loop as "
            f"criterion(outputs, targets, weight * {term}):\n\n"
            f"{before}"
            "    class Criterion(nn.Module):\n"
            "        def forward(self, outputs, targets, term):\n"
            f"            return {name or 'loss_of'}(outputs, targets) + term\n\n"
            f"If the model computes its loss, and {term} is all of it, give the optimizer an "
            "adler.ModelLoss in the criterion's place"
        )
    if module:
        return not_a_tensor(result, has_output_fn=False)
    return (
        f"the model returned {kind}, and the criterion is a function, whose calls no hook "
        "sees. Make it a module, give that to the optimizer and call it in the loop; it may "
        "receive any of what the model returned:\n\n"
        f"{before}"
        "    class Criterion(nn.Module):\n"
        "        def forward(self, *args, **kwargs):\n"
        f"            return {name or 'loss_of'}(*args, **kwargs)\n\n"
        "For a loss of one of them, output_fn= and step(targets=...) do as well"
    )


def _name_of(criterion: Any) -> str | None:
    """As code that stands beside ``from torch import nn``; None: it has no name of its own."""
    name = getattr(criterion, "__name__", None)
    if not isinstance(name, str) or not name.isidentifier():
        return None
    return f"nn.functional.{name}" if getattr(nn.functional, name, None) is criterion else name


def _takes_two(criterion: Any) -> bool:
    """Whether outputs and targets are all that it asks for."""
    try:
        forward = criterion.forward if isinstance(criterion, nn.Module) else criterion
        inspect.signature(forward).bind(None, None)
    except (TypeError, ValueError):
        return False
    return True
