"""How a worker of ours starts: Ray calls ``lean_imports`` first of all in each of its processes.

A worker is a new process, so what its libraries import is what it waits for. transformers imports
scikit-learn, and with it SciPy, for one curve of its assisted generation; and Python looks for garbage
again and again in a heap that only grows, as vLLM does while it starts and accelerate between models.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

SLOW = {
    "torch": None,
    "transformers.models.auto.auto_factory": None,
    "transformers.generation.candidate_generator": "sklearn",
    "peft": None,
    "vllm.entrypoints.llm": None,
    "vllm.engine.arg_utils": None,
    "vllm.v1.engine.async_llm": None,
}
"""Modules that take seconds to import, each with the package, if any, that it is to take for absent."""


def lean_imports() -> None:
    """Make later imports of ``SLOW`` in this process lean; to all other modules nothing is absent."""
    sys.meta_path.insert(0, _Lean())


class _Lean(MetaPathFinder):
    """Finds the modules of ``SLOW`` where Python would, and leaves the others to it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module that imports leanly; None for one that isn't slow."""
        if fullname not in SLOW:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(_run, spec.loader.exec_module, SLOW[fullname])
        return spec


def _run(execute: Callable[[ModuleType], None], absent: str | None, module: ModuleType) -> None:
    collects = gc.isenabled()
    gc.disable()
    try:
        with _hidden(absent) if absent else nullcontext():
            execute(module)
    finally:
        # What was imported stays: nobody need look for garbage in it. No model is loaded so early.
        gc.freeze()
        if collects:
            gc.enable()


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Within the block a package that wasn't imported yet can't be."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # pyright: ignore[reportArgumentType] - Python's own word for it
    try:
        yield
    finally:
        del sys.modules[package]
