"""Compiling modules in place, and restoring them where that is not possible."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class CompilationError(RuntimeError):
    """PyTorch cannot compile on this machine; the message is the first line of PyTorch's."""


@contextmanager
def compiling(modules: Iterable[nn.Module] = (), **options: Any) -> Iterator[None]:
    """Compile modules in place, for a `with` block that must run them: PyTorch compiles on the first run.

    Args:
        modules: restored if compilation fails.
        options: for `nn.Module.compile`.

    Raises:
        CompilationError: if the modules, or anything else that the block compiles, cannot be compiled.
    """
    compiled = []
    try:
        for module in modules:
            compiled.append(module)
            module.compile(**options)
        yield
    except RuntimeError as error:  # the only common base of PyTorch's compilation errors
        for module in compiled:
            module._compiled_call_impl = None  # there is no public way to undo `compile`
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CompilationError(reason) from error
