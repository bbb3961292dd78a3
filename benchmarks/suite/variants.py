"""Options of this library's optimizers in a method's name: ``adler@max_kl=0.03,lr=0.5``.

The names are the keyword arguments of the class, and the fields of its ``guard`` and ``measure``.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from typing import Any

from torch.optim import Optimizer

import adler

__all__ = ["VARIED", "arguments", "defaults", "variant"]

VARIED: dict[str, type[Optimizer]] = {
    "adler": adler.Adler,
    "adler-adam": adler.AdlerAdam,
    "adler-schedulefree": adler.AdlerScheduleFree,
    "adler-muon": adler.AdlerMuon,
}
_NOT_VARIED = {"output_fn", "follow_mode"}
_VALUES = {"guard": adler.Guard, "measure": adler.Measure}


def defaults(base: str) -> dict[str, Any]:
    """The options of a class that has variants, and their defaults.

    Examples:
        >>> defaults("adler")["fraction"]
        0.25
    """
    found: dict[str, Any] = {}
    for p in inspect.signature(VARIED[base]).parameters.values():
        if p.name in _VALUES:
            found |= dataclasses.asdict(p.default)
        elif p.kind is p.KEYWORD_ONLY and p.name not in _NOT_VARIED:
            found[p.name] = p.default
    return found


def variant(name: str) -> tuple[str, dict[str, Any]]:
    """The base and the options of a name such as ``"adler@max_kl=0.03,lr=0.5"``.

    Raises:
        ValueError: For a base without variants, an unknown option, or a value that is no literal.

    Examples:
        >>> variant("adler-adam@betas=(0.9, 0.99),max_kl=None")
        ('adler-adam', {'betas': (0.9, 0.99), 'max_kl': None})
    """
    base, _, text = name.partition("@")
    if base not in VARIED:
        raise ValueError(f"method {name!r}: only {', '.join(VARIED)} have variants")
    allowed = defaults(base)
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not call.keywords:
            raise ValueError("no option")
        options = {
            keyword.arg or "**": ast.literal_eval(keyword.value) for keyword in call.keywords
        }
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"method {name!r}: expected {base}@option=value,... with literal values ({error})"
        ) from error
    for option in options:
        if option not in allowed:
            raise ValueError(f"method {name!r}: {option!r} is none of {', '.join(allowed)}")
    return base, options


def arguments(base: str, options: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of the class for some of `defaults`' options.

    Raises:
        ValueError: If a bound or a measurement cannot be so.

    Examples:
        >>> arguments("adler", {"lr": 0.5, "max_kl": 0.1})["guard"].max_kl
        0.1
    """
    signature = inspect.signature(VARIED[base]).parameters
    found = dict(options)
    for name, kind in _VALUES.items():
        fields = {field.name for field in dataclasses.fields(kind)}
        mine = {option: found.pop(option) for option in options if option in fields}
        if mine:
            found[name] = dataclasses.replace(signature[name].default, **mine)
    return found
