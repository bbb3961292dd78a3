r"""The tangent kernel layer by layer, from what a backward pass already has.

With independent examples, the gradient of output ``c`` of example ``i`` with respect to a linear
layer's weight is the outer product $\delta_{ic}\, a_i^\top$ of the gradient at the layer's output
and the layer's input. So its part of the kernel is an entrywise product of two Gram matrices,

$$
K_{(i,c),(j,c')} = (a_i^\top a_j + 1)\; \delta_{ic}^\top \delta_{jc'},
$$

the 1 for a bias, and one backward pass gives $\delta_{ic}$ for all examples at once. Parameters of
other layers take per-example Jacobians.

Whether examples are independent is not known here: the caller compares with an exact product.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adler._recording.replay import Call
from adler.curvature.jacobian import Parameters, differentiable_attention

__all__ = ["by_module", "layer_kernels"]


def layer_kernels(call: Call, params: Parameters, max_bytes: int) -> dict[str, Tensor]:
    """The parts of the kernel by module, if examples are independent.

    Args:
        call: The model's call.
        params: By name.
        max_bytes: The largest temporary.

    Returns:
        Each ``(N, N)``, with ``N = b·C`` rows, example by example.

    Raises:
        NotImplementedError: If the network or the memory does not allow it.
    """
    modules = by_module(params)
    with torch.enable_grad(), differentiable_attention(), _recording(call, modules) as calls:
        outputs = call(params)
        if outputs.ndim == 0:
            raise NotImplementedError("outputs without examples")
        b = outputs.shape[0]
        linear = {name: seen[0] for name, seen in calls.items() if _is_plain(seen, b)}
        found = _linear_kernels(linear, modules, outputs.reshape(b, -1), max_bytes)
    rest = {name: members for name, members in modules.items() if name not in linear}
    for group in _fitting(rest, outputs.numel() * outputs.element_size(), max_bytes):
        found.update(_jacobian_kernels(call, params, group, b))
    return found


def by_module(params: Parameters) -> dict[str, dict[str, Tensor]]:
    """Parameters by the name of the module that holds them, then by name."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, p in params.items():
        modules.setdefault(name.rpartition(".")[0], {})[name] = p
    return modules


# --- linear layers -------------------------------------------------------------------------------


class _Seen(NamedTuple):
    input: Tensor
    output: Tensor


@contextlib.contextmanager
def _recording(
    call: Call, modules: dict[str, dict[str, Tensor]]
) -> Iterator[dict[str, list[_Seen]]]:
    """Inputs and outputs of the linear layers, call by call."""
    seen: dict[str, list[_Seen]] = {}
    with contextlib.ExitStack() as stack:
        for name, module in call.model.named_modules():
            shared = name in modules and _is_shared(call.model, modules[name])
            if name not in modules or type(module) is not nn.Linear or shared:
                continue

            def record(_: nn.Module, args: Any, output: Tensor, name: str = name) -> Tensor:
                if not output.requires_grad:
                    output = output.detach().requires_grad_()
                seen.setdefault(name, []).append(_Seen(args[0].detach(), output))
                return output.clone()  # an activation may work in place

            stack.callback(module.register_forward_hook(record).remove)
        yield seen


def _is_shared(model: nn.Module, members: dict[str, Tensor]) -> bool:
    """Whether a parameter has a second name: tied weights."""
    own = dict(model.named_parameters(remove_duplicate=False))
    return any(sum(p is own[member] for p in own.values()) > 1 for member in members)


def _is_plain(seen: list[_Seen], b: int) -> bool:
    return len(seen) == 1 and seen[0].input.ndim == 2 and seen[0].input.shape[0] == b


def _linear_kernels(
    linear: dict[str, _Seen],
    modules: dict[str, dict[str, Tensor]],
    outputs: Tensor,
    max_bytes: int,
) -> dict[str, Tensor]:
    b, C = outputs.shape
    found: dict[str, Tensor] = {}
    sizes = {name: b * C * seen.output.shape[1] * 4 for name, seen in linear.items()}
    for group in _packed(sizes, max_bytes):
        deltas: dict[str, list[Tensor]] = {name: [] for name in group}
        at = [linear[name].output for name in group]
        for column in outputs.sum(0):
            gradients = torch.autograd.grad(column, at, retain_graph=True, materialize_grads=True)
            for name, gradient in zip(group, gradients, strict=True):
                deltas[name].append(gradient)
        for name in group:
            own = {member.rpartition(".")[2] for member in modules[name]}
            delta = torch.stack(deltas.pop(name), dim=1).flatten(0, 1)  # (b·C, out)
            a = linear[name].input
            gram = a @ a.T if "weight" in own else torch.zeros(b, b, dtype=a.dtype, device=a.device)
            if "bias" in own:
                gram = gram + 1
            kernel = (delta @ delta.T).view(b, C, b, C)
            found[name] = kernel.mul_(gram[:, None, :, None]).view(b * C, b * C)
    return found


# --- everything else -----------------------------------------------------------------------------


def _jacobian_kernels(
    call: Call, params: Parameters, group: dict[str, dict[str, Tensor]], b: int
) -> dict[str, Tensor]:
    leaves, spec = pytree.tree_flatten((call.args, dict(call.kwargs)))
    batched = [
        i
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == b
    ]

    def outputs_of_one(mine: Parameters, examples: list[Tensor]) -> Tensor:
        filled = list(leaves)
        for i, example in zip(batched, examples, strict=True):
            filled[i] = example.unsqueeze(0)
        args, kwargs = pytree.tree_unflatten(filled, spec)
        one = dataclasses.replace(call, args=args, kwargs=kwargs)
        return one({**params, **mine}).flatten()

    params = {name: p.detach() for name, p in params.items()}
    mine = {name: params[name] for members in group.values() for name in members}
    jacobian = torch.func.vmap(torch.func.jacrev(outputs_of_one), in_dims=(None, 0))
    try:
        with differentiable_attention():
            rows = jacobian(mine, [leaves[i] for i in batched])
    except (RuntimeError, ValueError) as error:
        # Not every op can be batched, nor every layer see one example. Products can do both.
        raise NotImplementedError(str(error)) from error
    found = {}
    for module, members in group.items():
        J = torch.cat([rows[name].flatten(2) for name in members], dim=2).flatten(0, 1)
        found[module] = J @ J.T
    return found


def _fitting(
    rest: dict[str, dict[str, Tensor]], bytes_each: int, max_bytes: int
) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Groups of modules whose Jacobians fit into memory together."""
    sizes = {name: bytes_each * sum(p.numel() for p in m.values()) for name, m in rest.items()}
    for group in _packed(sizes, max_bytes):
        yield {name: rest[name] for name in group}


def _packed(sizes: dict[str, int], most: int) -> Iterator[list[str]]:
    """Names in order, in groups of at most so many bytes."""
    group: list[str] = []
    for name, size in sizes.items():
        if size > most:
            raise NotImplementedError(f"{name!r} needs {size} bytes")
        if group and sum(sizes[n] for n in group) + size > most:
            yield group
            group = []
        group.append(name)
    if group:
        yield group
