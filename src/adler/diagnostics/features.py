r"""Gram matrices of a network's features, module by module.

For the features $f^m(x) \in \mathbb{R}^{d_m}$ that module $m$ computes from example $x$, flattened,

$$
G^m_{ij} = \langle f^m(x_i), f^m(x_j) \rangle, \qquad i, j = 1, \dots, b.
$$

For a network with one output, the part of the tangent kernel that comes from the weights of a
linear layer is the entrywise product of the Gram matrix $G^m$ of what enters the layer and that of
the output's derivatives $\delta$ by what leaves it. By Schur's product theorem the smallest
eigenvalue of this part is at least $\lambda_{\min}(G^m) \min_i \|\delta_i\|^2$.

Source: $G^m$ is that of (4.9) in D. Balboni, *An Optimization Perspective on Deep Neural Networks*,
PhD thesis, Scuola Normale Superiore, 2025, section 4.4.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adler._recording.replay import Call
from adler._unwrap import unwrap
from adler.diagnostics.gram import gram

__all__ = ["feature_grams"]


def feature_grams(
    model: nn.Module,
    inputs: Any,
    modules: Iterable[str] | None = None,
    output_fn: Callable[[Any], Tensor] | None = None,
    *,
    include_input: bool = False,
) -> dict[str, Tensor]:
    """Gram matrices of what the modules of a network return.

    The model runs once, without autograd; parameters, buffers, random number generators and
    train/eval mode are as before afterwards. Features are not kept: each Gram matrix is computed as
    soon as its module returns, before an in-place activation can overwrite them.

    Examples run along the first dimension of the first tensor of ``inputs``, and of every output.

    Args:
        model: The network.
        inputs: One argument, a tuple of positional arguments, or a mapping of keyword arguments.
        modules: Names as in ``model.named_modules()``; ``""`` is the network's output. Default:
            every module that contains no other; of these, ones that don't run, or return something
            else than floating-point features of every example, are left out.
        output_fn: Picks the network's output from what the model returns; for ``""`` only.
        include_input: Puts the Gram matrix of the input itself first, under ``"input"``.

    Returns:
        By name, in the order in which the modules return: shape ``(b, b)``, float32 or wider. The
        second call of a module is called ``"name#2"``, the third ``"name#3"``.

    Raises:
        ValueError: If a named module does not exist, does not run, or returns something else than
            one floating-point tensor with ``b`` rows; or if ``inputs`` holds no examples.
        TypeError: If ``""`` is asked for and the output is not one tensor; or if
            ``include_input`` is set and the input is not one floating-point tensor.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU())
        >>> grams = feature_grams(model, torch.randn(5, 3), include_input=True)
        >>> {name: tuple(G.shape) for name, G in grams.items()}
        {'input': (5, 5), '0': (5, 5), '1': (5, 5)}
    """
    model = unwrap(model)
    examples = _count_examples(inputs)
    found = {}
    if include_input:
        found["input"] = _input_gram(model, inputs)
    watched = _watched(model, modules)
    calls = dict.fromkeys(watched, 0)

    def record(name: str, output: object) -> None:
        calls[name] += 1
        fault = _fault(output, examples)
        if fault is None and isinstance(output, Tensor):
            found[name if calls[name] == 1 else f"{name}#{calls[name]}"] = gram(output)
        elif modules is not None:
            raise ValueError(
                f"modules: {name!r} returned {fault}, not a floating-point tensor with {examples} "
                "rows, one for each example: leave it out"
            )

    wants_output = watched.pop("", None) is not None
    call = Call.of(model, inputs, output_fn if wants_output else _anything)
    with contextlib.ExitStack() as stack, torch.no_grad():
        for name, module in watched.items():
            handle = module.register_forward_hook(_hook(record, name))
            stack.callback(handle.remove)
        outputs = call({name: p.detach() for name, p in model.named_parameters()})
        if wants_output:
            record("", outputs)
    silent = [name for name in watched if calls[name] == 0]
    if modules is not None and silent:
        raise ValueError(f"modules: {silent} did not run in the forward pass: leave them out")
    return found


# --- helpers --------------------------------------------------------------------------------------


def _hook(record: Callable[[str, object], None], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: object) -> None:
        record(name, output)

    return hook


def _anything(result: object) -> Tensor:
    """Only features are wanted: the model may return what it likes."""
    return torch.empty(0)


def _watched(model: nn.Module, modules: Iterable[str] | None) -> dict[str, nn.Module]:
    """The modules to watch, by name; by default those without children."""
    if modules is None:
        return {name: m for name, m in model.named_modules() if not any(True for _ in m.children())}
    if isinstance(modules, str):
        raise ValueError(f"modules={modules!r}: pass a list of names, such as [{modules!r}]")
    known = dict(model.named_modules(remove_duplicate=False))
    names = list(dict.fromkeys(modules))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"modules: the model has no modules {unknown}; model.named_modules() lists its names"
        )
    return {name: known[name] for name in names}


def _fault(output: object, examples: int) -> str | None:
    """Why an output has no Gram matrix of the examples, or None if it has one."""
    if not isinstance(output, Tensor):
        return type(output).__name__
    if output.ndim == 0 or output.shape[0] != examples or not output.is_floating_point():
        return f"a tensor of shape {tuple(output.shape)} and dtype {output.dtype}"
    return None


def _count_examples(inputs: Any) -> int:
    """Rows of the first tensor of the inputs."""
    tree = dict(inputs) if isinstance(inputs, Mapping) else inputs
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            if leaf.shape[0] == 0:
                break
            return int(leaf.shape[0])
    raise ValueError("inputs: no tensor with examples along its first dimension; pass a batch")


def _input_gram(model: nn.Module, inputs: Any) -> Tensor:
    if "input" in dict(model.named_modules()):
        raise ValueError(
            "include_input=True: the model has a module of the name 'input'; use gram(inputs)"
        )
    (only,) = inputs if isinstance(inputs, tuple) and len(inputs) == 1 else (inputs,)
    if not isinstance(only, Tensor) or not only.is_floating_point():
        kind = only.dtype if isinstance(only, Tensor) else type(only).__name__
        raise TypeError(
            f"include_input=True: the inputs ({kind}) are not one floating-point tensor"
        )
    return gram(only.detach())
