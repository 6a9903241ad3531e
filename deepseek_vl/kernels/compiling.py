"""Compiling modules in place, and finding them as they were where that is not possible."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class CompilationError(RuntimeError):
    """PyTorch cannot compile on this machine; the message is the first line of what it says."""


@contextmanager
def compiling(modules: Iterable[nn.Module] = (), **options: Any) -> Iterator[None]:
    """Compile modules in place, for a `with` block that runs them, as PyTorch compiles when something is run.

    Args:
        modules: left as they were if that fails.
        options: for `nn.Module.compile`.

    Raises:
        CompilationError: if they, or what else is compiled in the block, cannot be.
    """
    compiled = []
    try:
        for module in modules:
            compiled.append(module)
            module.compile(**options)
        yield
    except RuntimeError as error:  # PyTorch has one for each of its parts, and no common one
        for module in compiled:
            module._compiled_call_impl = None  # `compile` has no other way back
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CompilationError(reason) from error
