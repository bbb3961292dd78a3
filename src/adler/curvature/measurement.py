"""Which engine measures a batch's curvature, and on how much of the batch.

The engine that was asked for measures. Where it raises an error, or the checks of
`adler.curvature.trust` fail, others are tried: one may be exact where another is not. Of a part of
a batch, the checks that need the whole batch are made on the whole batch, now and then.
"""

from __future__ import annotations

from dataclasses import replace

from adler._recording.records import TargetsError
from adler._recording.replay import ExplainedError, replaying
from adler._warning import warn
from adler.curvature import trust
from adler.curvature.batch_along import BatchAlong, BatchCurvature, CriterionError
from adler.curvature.jacobian import ForwardModeUnsupportedError, warn_of_fallback

__all__ = ["batch_curvature"]


# Measurements of a part for one of the whole batch.
_PARTS = 32


def batch_curvature(one: BatchAlong, jvp: str, alone: bool = True) -> BatchCurvature:
    """Sums ``vᵀ Q v`` over the losses that made the gradient.

    The GGN of a weighted sum of losses is the weighted sum of their GGNs. Losses of one call share
    its replay.

    Args:
        one: The losses, and the direction.
        jvp: Name of the engine.
        alone: Whether this process decides; otherwise all would have to choose one engine.

    Raises:
        RuntimeError: If a replay makes another shape than the criterion received.
        ValueError: If explicit targets do not fit the outputs.
    """
    with replaying():
        found = (_of_a_part if one.partial else _best)(one, jvp, alone)
    one.memory.measurements += 1
    return found


def _of_a_part(one: BatchAlong, jvp: str, alone: bool) -> BatchCurvature:
    """A part's; what it cannot tell of the training pass, the whole batch can, now and then."""
    memory, batch = one.memory, [loss if loss.whole is None else loss.whole for loss in one.batch]
    whole, part = replace(one, batch=batch), replace(one, expected=None)
    sure: BatchCurvature | None = None
    memory.full -= 1
    if memory.full < 0:
        sure = _best(whole, jvp, alone)
        jvp = sure.engine
        memory.full = 0 if alone and memory.distrusts(sure.trusted) else _PARTS
    try:
        found = part.run(jvp) if sure is not None else _best(part, jvp, alone)
    except ExplainedError as error:
        if not isinstance(error, TargetsError):
            raise
        memory.full = 0  # (where these are wrong, they are so for the whole batch)
        return _best(whole, jvp, alone) if sure is None else sure
    except Exception:
        # A hidden state, or what the criterion holds of the batch, is of the whole batch's size.
        memory.full = 0
        return _best(whole, jvp, alone) if sure is None else sure
    if alone and memory.distrusts(found.trusted):
        # Its examples depend on the others, or it is not repeated.
        return _best(whole, jvp, alone) if sure is None else sure
    # What arrived at a part of the outputs is no slope of the batch.
    found = found._replace(slope=None if sure is None else sure.slope)
    if sure is not None:
        memory.whole = sure.trusted, sure.checks
    if memory.whole is None or memory.whole[0] is None:
        return found
    known, whole_checks = memory.whole
    assert known is not None
    trusted = known if found.trusted is None else known & found.trusted
    return found._replace(trusted=trusted, checks={**found.checks, **whole_checks})


def _best(one: BatchAlong, jvp: str, alone: bool) -> BatchCurvature:
    """What the engine measures, or another one that the checks agree with where it fails them."""
    memory, error = one.memory, None
    found: BatchCurvature | None = None
    try:
        try:
            found = one.run(jvp)
        except ForwardModeUnsupportedError as unsupported:
            warn_of_fallback(unsupported.op)
            jvp = "finite_difference"
            found = one.run(jvp)
    except ExplainedError:
        raise
    except CriterionError as caught:
        raise (caught.__cause__ or caught) from None
    except Exception as caught:  # whatever a forward pass may raise where it is run another way
        error = caught
    if found is not None:
        if not alone or one.sharded or not memory.distrusts(found.trusted):
            return found
        if not memory.tries_others(found.checks):
            return found
    first = found
    for name, graph in _others(jvp, memory.with_graph):
        try:
            other = one.run(name, graph=graph, known=False)
        except Exception as caught:
            error = error or caught
            continue
        if other.trusted is None or trust.on_host(other.trusted, wait=True):
            memory.with_graph = graph
            _announce(jvp, name, first, error)
            memory.failed = 0
            return other
        # What failed here says more: a difference of known outputs does not see them.
        found = other if found is None else found._replace(checks={**other.checks, **found.checks})
    if found is None:
        raise RuntimeError(
            "step(): the forward pass cannot be run once more, which a measurement needs: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not _repeats(found):
        for call in {loss.call for loss in one.batch}:
            if call.state is not None:
                call.state.not_repeated()
    memory.give_up()
    return found


def _repeats(found: BatchCurvature) -> bool:
    """Whether a replay, where it was compared, has made the outputs of the training pass."""
    same = found.checks.get("outputs")
    return same is None or bool(trust.on_host(same, wait=True))


def _others(jvp: str, graph: bool) -> list[tuple[str, bool]]:
    """Ways to measure where one has failed, with the graph of a training pass or without."""
    ways = [(jvp, True), ("forward", graph), ("forward", True), ("double_backward", True)]
    ways += [("finite_difference", graph), ("finite_difference", True)]
    tried = set() if jvp == "finite_difference" else {(jvp, graph or jvp == "double_backward")}
    return [way for way in dict.fromkeys(ways) if way not in tried]


def _announce(jvp: str, name: str, found: BatchCurvature | None, error: Exception | None) -> None:
    """Says why another engine measures from now on.

    Args:
        jvp: The engine that failed.
        name: The one that agrees with the training pass.
        found: What the first has measured; None: it raised an error.
        error: The first error of any engine: of this one's only where it has measured nothing.
    """
    if name == jvp:
        return
    if found is None:
        why = f"raises an error on this model ({type(error).__name__}: {str(error)[:200]})"
    elif not _repeats(found):
        why = (
            "does not make the outputs of the training pass once more (as where random numbers are "
            "drawn for what attention returns, which its differentiable kernel lays out in memory "
            "in another order)"
        )
    elif jvp == "finite_difference":
        why = (
            "contradicts the gradient (its step is lost in the rounding of the outputs, as where "
            "the loss on a batch is almost zero, or crosses a kink; or a no_grad block, hook or "
            "custom autograd.Function stops or changes gradients, which a difference does not see)"
        )
    else:
        why = (
            "contradicts the gradient (an operation whose forward derivative is missing or zero, "
            "or a hook or custom autograd.Function that changes gradients on their way)"
        )
    warn(f"jvp={jvp!r} {why}; jvp={name!r} agrees with it and is used from now on")
