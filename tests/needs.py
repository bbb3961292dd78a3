"""Skips what a package of the benchmarks is missing for."""

import pytest

from benchmarks.suite.methods import method


def need(package):
    if package is not None:
        pytest.importorskip(package, reason=f"{package}: pip install 'torch-adler[benchmarks]'")


def needing(name):
    need(method(name).package)
    return method(name)
