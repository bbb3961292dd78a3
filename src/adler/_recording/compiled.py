"""Replays of a compiled model, compiled by its own compiler.

``torch.compile`` cannot be differentiated forwards from outside, but it compiles a function that
differentiates forwards inside. So the replay of a compiled model is two such functions: its outputs
and its Jacobian-vector product. What each says first is compared with the uncompiled replay. If it
is not the same, or there is an error, one warning says so and replays are no longer compiled.

Where the model's compiler records CUDA graphs (``mode="reduce-overhead"``), replays are never
compiled: each run of a graph writes over what the last one returned, the gradients among it.
"""

from __future__ import annotations

import contextlib
import importlib
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.torch_version import TorchVersion

from adler import _distributed as distributed
from adler._warning import warn

__all__ = ["Compiled", "derivative", "outputs"]

Found = TypeVar("Found")

# Of the norm: fused kernels round otherwise, and a unit of ReLU may be on the other side of zero.
_TOLERANCE = 0.05
# Where shapes are symbolic and its input has no tangent, layer_norm's forward derivative ends the
# process in PyTorch 2.6 and 2.7, with no error to catch; in 2.13 it does not.
_NEEDS_STATIC_SHAPES = TorchVersion(torch.__version__) < "2.13"


class Compiled:
    """Compiled functions of one model.

    Args:
        compiler: Compiles a function, with the options of the model's.
    """

    def __init__(self, compiler: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self._functions: dict[Callable[..., Any], Callable[..., Any]] = {
            f: compiler(_with_code_of_its_own(f)) for f in (outputs, derivative)
        }
        if _NEEDS_STATIC_SHAPES and getattr(compiler, "_dynamic", None):  # as the user wants it
            del self._functions[derivative]
        self._known: set[Callable[..., Any]] = set()
        self._refused = False

    @classmethod
    def of(cls, model: nn.Module) -> Compiled | None:
        """With the compiler of a model that is compiled; None for another, or with CUDA graphs.

        `DistributedDataParallel` may be around it.
        """
        inner = getattr(distributed.find_ddp(model), "module", None)
        for module in (model, inner):
            compiler = getattr(module, "dynamo_ctx", None)
            if compiler is not None:
                return None if _records_graphs(compiler) else cls(compiler)
        return None

    def __call__(
        self,
        function: Callable[..., Found],
        plain: Callable[[], Found],
        model: nn.Module,
        *arguments: Any,
    ) -> Found:
        """What a function of this module says, compiled if that works.

        Args:
            function: `outputs` or `derivative`.
            plain: The same without compiling, for the first time and for when it fails.
            model: The module beneath the compiled one.
            *arguments: The function's.
        """
        if self._refused or function not in self._functions:
            return plain()
        try:
            with _shapes(function):
                found: Found = self._functions[function](model, *arguments)
        except Exception as error:  # whatever a compiler may raise
            self._refuse(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            return plain()
        if function in self._known:
            return found
        expected = plain()
        if not _same(found, expected):
            self._refuse("it differs from the uncompiled one")
            return expected
        self._known.add(function)
        return found

    def _refuse(self, why: str) -> None:
        self._refused = True
        warn(
            f"the replay of the compiled model is not compiled ({why}): steps take longer, and are "
            "the same otherwise"
        )


def outputs(
    model: nn.Module,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output_fn: Callable[[Any], Tensor] | None,
    tie_weights: bool = True,
) -> Tensor:
    """What the loss sees of a call, as a pure function."""
    # Cloned here, inside any function transform: running statistics are updated in place.
    tensors = {**{name: buffer.clone() for name, buffer in buffers.items()}, **params}
    result = functional_call(model, tensors, args, kwargs, tie_weights=tie_weights)
    found: Tensor = result if output_fn is None else output_fn(result)
    return found


def derivative(
    model: nn.Module,
    params: dict[str, Tensor],
    direction: dict[str, Tensor],
    buffers: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output_fn: Callable[[Any], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Outputs, and tangents along a direction."""

    def f(at: dict[str, Tensor]) -> Tensor:
        return outputs(model, at, buffers, args, kwargs, output_fn)

    return cast(tuple[Tensor, Tensor], torch.func.jvp(f, (params,), (direction,)))


def _shapes(function: Callable[..., Any]) -> contextlib.AbstractContextManager[Any]:
    """In which a function is compiled anew for other shapes, where symbolic ones are no good."""
    if not _NEEDS_STATIC_SHAPES or function is not derivative:
        return contextlib.nullcontext()
    # Only where a model is compiled is the compiler loaded.
    settings: Any = importlib.import_module("torch._dynamo.config")
    return cast(
        contextlib.AbstractContextManager[Any], settings.patch(automatic_dynamic_shapes=False)
    )


def _records_graphs(compiler: Any) -> bool:
    settings = getattr(compiler, "compiler_config", None) or {}
    return bool(settings.get("triton.cudagraphs"))


def _with_code_of_its_own(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy: what is compiled for one code object is shared, and limited in number."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace()
    return types.FunctionType(
        code,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def _same(found: Any, expected: Any) -> bool:
    """Whether tensors, or pairs of them, are close in norm; waits for the device."""
    if isinstance(found, tuple):
        return all(_same(*pair) for pair in zip(found, expected, strict=True))
    error = torch.linalg.vector_norm((found - expected).double())
    return bool(error <= _TOLERANCE * torch.linalg.vector_norm(expected.double()))
