r"""The tangent kernel $K(\theta) = J J^\top$ of a network on some inputs."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adler._recording.replay import Call, RandomState, accelerators
from adler.curvature.jacobian import (
    ForwardModeUnsupportedError,
    Parameters,
    double_backward,
    forward,
    transpose,
)
from adler.curvature.layerwise import by_module, layer_kernels
from adler.curvature.parameters import named_parameters
from adler.curvature.spectrum import (
    Interval,
    PowerIteration,
    gershgorin,
    has_scipy,
    lanczos,
    power_iteration,
)

__all__ = ["TangentKernel"]

# Dense eigenvalues of a matrix of this size take less time than a Lanczos run.
_SMALL = 1024


class TangentKernel:
    r"""The tangent kernel $K = J J^\top$, with $J = \partial F / \partial \theta$.

    ``F`` is flattened row by row: entry ``i C + c`` is output ``c`` of example ``i``. The operator
    never forms ``J``: a product with ``K`` is one vector-Jacobian and one Jacobian-vector product.
    `to_dense` uses, where it can, that the gradient of a linear layer is an outer product and that
    examples do not see each other, at the price of ``C`` backward passes; the result must reproduce
    an exact product with ``K``, or the columns are computed one by one.

    Args:
        model: The network, in the mode (train or eval) it is in.
        inputs: One argument, a tuple of positional arguments, or a mapping of keyword arguments.
        params: By name or as a sequence of parameters of the model: those of the kernel. Default:
            all that require a gradient. A layer's are ``layer.parameters()``.
        output_fn: Picks the tensor of interest from what the model returns.
        max_bytes: The largest temporary, and the largest dense kernel, that may be made.

    Dropout masks are drawn once: every product is with the same matrix. The parameters are those
    of the moment of a product, so the kernel of a network in training is made anew.

    Raises:
        ValueError: If there is no parameter or no output, or one is not finite.

    Source: A. Jacot, F. Gabriel, C. Hongler, arXiv 1806.07572; D. Balboni, PhD thesis, SNS 2025,
    sections 2.3, 4.3, 4.4 and (7.5).

    Examples:
        >>> model = torch.nn.Linear(3, 2)
        >>> kernel = TangentKernel(model, torch.eye(3))
        >>> kernel.shape
        (6, 6)
        >>> round(kernel.largest_eigenvalue(), 4)  # xᵀx + 1 on the blocks
        4.0
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        params: Parameters | Iterable[Tensor] | None = None,
        *,
        output_fn: Callable[[Any], Tensor] | None = None,
        max_bytes: int = 2**30,
    ) -> None:
        self.model, self.max_bytes = model, max_bytes
        self.params = named_parameters(model, params)
        if not self.params:
            raise ValueError("params: no parameter, so no tangent kernel")
        for name, p in self.params.items():
            if not torch.isfinite(p).all():
                raise ValueError(f"params: {name!r} is not finite; so the kernel would not be")
        self.call = dataclasses.replace(
            Call.of(model, inputs, output_fn), random_state=RandomState.now(accelerators(model))
        )
        with torch.no_grad():
            outputs = self.call(self.params)
        if outputs.numel() == 0:
            raise ValueError(f"inputs: the outputs have shape {tuple(outputs.shape)}: none at all")
        if not torch.isfinite(outputs).all():
            raise ValueError("inputs: the outputs are not finite; so the kernel would not be")
        self.outputs = outputs
        self._dense: Tensor | None = None
        self._forward_mode = True

    def __repr__(self) -> str:
        """Shape and dtype."""
        return f"TangentKernel(shape={self.shape}, dtype={self.dtype}, device={self.device})"

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, N)``, ``N`` outputs times examples."""
        return self.outputs.numel(), self.outputs.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Of the outputs."""
        return self.outputs.dtype

    @property
    def device(self) -> torch.device:
        """Of the outputs."""
        return self.outputs.device

    # --- products --------------------------------------------------------------------------------

    def matvec(self, v: Tensor) -> Tensor:
        """``K v``, matrix-free.

        Args:
            v: Shape ``(N,)``, or ``(N, k)`` for several.

        Returns:
            Same shape.

        Raises:
            ValueError: If the shape is another.
        """
        if v.ndim not in (1, 2) or v.shape[0] != self.shape[0]:
            raise ValueError(
                f"v: shape {tuple(v.shape)}; expected ({self.shape[0]},) or ({self.shape[0]}, k)"
            )
        if v.ndim == 1:
            return self._product(self._pull, v)
        return torch.stack([self._product(self._pull, column) for column in v.T], dim=1)

    def _product(self, pull: Callable[[Tensor], Parameters], v: Tensor) -> Tensor:
        return self._push(pull(v.to(self.outputs).reshape(self.outputs.shape))).flatten()

    def _push(self, direction: Parameters) -> Tensor:
        """``J d``; where forward mode cannot go, transposed twice."""
        if self._forward_mode:
            try:
                return forward(self.call, self.params, direction)[1]
            except ForwardModeUnsupportedError:
                self._forward_mode = False
        return double_backward(self.call, self.params, direction)[1]

    @property
    def _pull(self) -> Callable[[Tensor], Parameters]:
        """``u ↦ Jᵀ u``."""
        return transpose(self.call, self.params)[1]

    # --- the matrix ------------------------------------------------------------------------------

    def to_dense(self) -> Tensor:
        """The matrix, ``(N, N)``, symmetric; kept for further questions.

        Raises:
            ValueError: If it needs more than ``max_bytes``.
        """
        if self._dense is None:
            self._check_size()
            dense = self._fast_dense()
            if dense is None:
                dense = self._columns(range(self.shape[0]))
            self._dense = (dense + dense.T) / 2
        return self._dense

    def _fast_dense(self) -> Tensor | None:
        """By layers, if that reproduces an exact product."""
        dense = None
        for part in self._layerwise().values():
            dense = part if dense is None else dense.add_(part)
        return dense if dense is not None and self._reproduces(dense) else None

    def layers(self) -> dict[str, Tensor]:
        """The parts of the kernel from each module's own parameters; they sum to the kernel.

        Returns:
            By module name, in the order of ``params``; each ``(N, N)``, positive semi-definite.

        Raises:
            ValueError: If one of them needs more than ``max_bytes``.
        """
        self._check_size()
        names = by_module(self.params)
        parts = self._layerwise()
        if not parts or not self._reproduces(functools.reduce(torch.add, parts.values())):
            parts = {
                name: self._part(members)._columns(range(self.shape[0]))
                for name, members in names.items()
            }
        return {name: (parts[name] + parts[name].T) / 2 for name in names}

    def _layerwise(self) -> dict[str, Tensor]:
        """Parts by module, not yet proven; empty where that way is closed."""
        try:
            return layer_kernels(self.call, self.params, self.max_bytes)
        except NotImplementedError:
            return {}

    def _part(self, members: Parameters) -> TangentKernel:
        """The kernel of some of the parameters; the others are as they are in the model."""
        part = copy.copy(self)
        part.params, part._dense = dict(members), None
        return part

    def _columns(self, indices: Iterable[int]) -> Tensor:
        """Some columns, ``(N, m)``, by exact products."""
        pull, one = self._pull, torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        found = []
        for index in indices:
            one[index] = 1
            found.append(self._product(pull, one))
            one[index] = 0
        return torch.stack(found, dim=1)

    def _reproduces(self, dense: Tensor) -> bool:
        """Whether a random product is the exact one: a layer might mix examples."""
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self.shape[0], generator=generator, dtype=torch.float64)
        v = v.to(self.device, self.dtype)
        exact = self.matvec(v)
        difference = torch.linalg.vector_norm(dense @ v - exact)
        rounding = math.sqrt(torch.finfo(self.dtype).eps)
        return bool(difference <= rounding * torch.linalg.vector_norm(exact))

    def _check_size(self) -> None:
        n = self.shape[0]
        needed = n * n * 8  # eigenvalues are computed in float64
        if needed > self.max_bytes:
            raise ValueError(
                f"the dense kernel of {n} outputs needs {needed / 2**30:.2g} GiB, max_bytes allows "
                f"{self.max_bytes / 2**30:.2g}: ask for largest_eigenvalue(method='lanczos'), take "
                "fewer examples, or raise max_bytes"
            )

    # --- the spectrum ----------------------------------------------------------------------------

    def eigenvalues(self) -> Tensor:
        """All, ascending, float64, of the dense kernel.

        Those below the rounding of the kernel's dtype, relative to the largest, are noise.
        """
        values: Tensor = torch.linalg.eigvalsh(self.to_dense().double())
        return values

    def largest_eigenvalue(
        self, method: Literal["auto", "dense", "lanczos", "power"] = "auto"
    ) -> float:
        """``λ_max(K)``, which is also that of ``JᵀJ``.

        Args:
            method: ``"auto"`` takes the dense kernel if it is known, or small and cheap, else
                ``"lanczos"`` (needs SciPy); ``"power"`` iterates up to a residual of 1e-6.
        """
        if self._choose(method) == "dense":
            return float(self.eigenvalues()[-1])
        if method == "power":
            return float(self.power_iteration(iterations=1000).value)
        return float(self._lanczos(self._pull, "LA"))

    def power_iteration(
        self, start: Tensor | None = None, *, iterations: int = 100, tolerance: float = 1e-6
    ) -> PowerIteration:
        """The largest eigenvalue and its vector, from a vector that is nearly one already.

        Along a training on the same inputs, the last kernel's vector is; one or two products then
        suffice.

        Args:
            start: Shape ``(N,)``. Default: a random one.
            iterations: Products at most.
            tolerance: Of the residual, relative to the value.

        Examples:
            >>> model, x = torch.nn.Linear(3, 2), torch.eye(3)
            >>> first = TangentKernel(model, x).power_iteration()
            >>> TangentKernel(model, x).power_iteration(first.vector).iterations
            1
        """
        if start is None:
            start = torch.randn(self.shape[0], generator=torch.Generator().manual_seed(0))
        pull = self._pull
        return power_iteration(
            lambda v: self._product(pull, v),
            start.to(self.device, self.dtype),
            iterations=iterations,
            tolerance=tolerance,
        )

    def smallest_eigenvalue(self, method: Literal["auto", "dense", "lanczos"] = "auto") -> float:
        """``λ_min(K)``: 0, up to rounding, with more outputs than parameters.

        Args:
            method: As for `largest_eigenvalue`. Lanczos converges slowly here, and may raise.
        """
        if method == "auto" and self.shape[0] <= _SMALL:
            method = "dense"
        if self._choose(method) == "dense":
            return float(self.eigenvalues()[0])
        return float(self._lanczos(self._pull, "SA"))

    def condition_number(self) -> float:
        """``λ_max / λ_min``; infinite where the smallest is not positive."""
        smallest = self.smallest_eigenvalue()
        return self.largest_eigenvalue() / smallest if smallest > 0 else math.inf

    def gershgorin(self, columns: int | None = None, seed: int = 0) -> Interval:
        """Gershgorin's bounds of the spectrum.

        Args:
            columns: How many to sample, without replacement, each one exact product. The discs of
                the others are not seen: an estimate of the bounds. Default: all.
            seed: Of the sample.

        Raises:
            ValueError: If there are fewer columns.
        """
        if columns is None:
            return gershgorin(self.to_dense())
        if not 1 <= columns <= self.shape[0]:
            raise ValueError(f"columns={columns!r}: expected 1 to {self.shape[0]}")
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(self.shape[0], generator=generator)[:columns]
        return gershgorin(self._columns(chosen.tolist()), chosen.to(self.device))

    def _choose(self, method: str) -> str:
        if method not in ("auto", "dense", "lanczos", "power"):
            raise ValueError(f"method={method!r}: expected 'auto', 'dense', 'lanczos' or 'power'")
        if method != "auto":
            return method
        if self._dense is None and self.shape[0] <= _SMALL:
            self._check_size()
            dense = self._fast_dense()
            if dense is not None or not has_scipy():
                self._dense = None if dense is None else (dense + dense.T) / 2
                return "dense"
        return "dense" if self._dense is not None else "lanczos"

    def _lanczos(self, pull: Callable[[Tensor], Parameters], which: Literal["LA", "SA"]) -> Tensor:
        return lanczos(
            lambda v: self._product(pull, v),
            self.shape[0],
            dtype=self.dtype,
            device=self.device,
            which=which,
        )[0]
