"""How a model's blocks are called: with their activations computed again in the backward pass, and with their code compiled.

Only `block.forward` is another one. Names of parameters and modules stay, and FSDP2's hooks, which gather and free parameters, stay
around it: nothing of them is compiled or called a second time.

Recomputing changes no bit: dropout draws the same numbers again. Compiling rounds otherwise, and always alike: shapes are static, so no
kernel depends on which shapes came before, and random numbers are those of torch's own generator. Only steps are compiled. Evaluations
and examinations of a bad step run as ever: a compilation would make them wait where nobody expects it.
"""

from __future__ import annotations

import contextlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .models import LanguageModel, Memory

COMPILED_FOLDER: Final = "compiled"  # of a node's scratch
COMPILE_S: Final = 1800.0  # a step may take so long where its blocks are compiled
_IN_RECOMPUTATION: Final = ContextVar("in_recomputation", default=False)


class BlockCall:
    """What stands for a block's `forward`."""

    def __init__(self, block: nn.Module, *, recompute: bool, compiled: bool) -> None:
        self._block, self._recompute, self._plain = block, recompute, block.forward
        self.is_compiled = compiled
        self._compiled: Callable[..., Any] | None = None
        if compiled:  # a region of its own: else the blocks would count as recompilations of one function, of which torch makes eight
            options = {"fallback_random": True}
            self._compiled = torch.compile(  # type: ignore[call-overload]  # its overloads lack what it takes
                block.forward, dynamic=False, isolate_recompiles=True, options=options
            )

    def __call__(self, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._plain(*args)
        forward = self._compiled if self._compiled is not None and self._block.training else self._plain
        if self._recompute and not any(isinstance(arg, Memory) for arg in args):  # a second call would find what the first has remembered
            return checkpoint(forward, *args, use_reentrant=False, context_fn=_contexts)
        return forward(*args)


def equip(model: LanguageModel, *, recompute: bool, compiled: bool) -> None:
    """Of the model that computes. Raises ValueError where something is to be compiled and no compiler is there."""
    if compiled:
        check_compiler()
        torch._dynamo.config.accumulated_recompile_limit = max(256, 8 * len(model.blocks))  # of all regions together
        torch._inductor.config.compile_threads = 1  # more would be processes, which outlive a rank that is killed
    for block in model.blocks if recompute or compiled else ():
        block.forward = BlockCall(block, recompute=recompute, compiled=compiled)


def check_compiler() -> None:
    """Raises ValueError when this node lacks what torch.compile needs."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    remedy = "install it on every node, or set train.compile = false"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        name = torch._inductor.config.cpp.cxx[-1]
        raise ValueError(f'run.toml: train.compile = true needs a C++ compiler, and "{name}" (CXX) is not there: {remedy}') from None
    if not (header := Path(sysconfig.get_path("include"), "Python.h")).exists():
        raise ValueError(f"run.toml: train.compile = true needs the headers of Python, and {header} is not there: {remedy}")


def keep_compiled(scratch: Path) -> None:
    """What is compiled from here on lies in the node's folder, where later attempts find it.

    Whatever the environment says: torch itself sets these variables, and a forked rank would inherit what its launcher's torch had set.
    """
    folder = scratch / COMPILED_FOLDER
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}


def in_recomputation() -> bool:
    """Whether modules are called for the second time: hooks that look at what they give have seen it."""
    return _IN_RECOMPUTATION.get()


def opaque(model: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names of modules that no hook can see, because they are compiled with their block."""
    blocks = ((name, module.__dict__.get("forward")) for name, module in model.named_modules())
    return tuple(f"{name}." for name, call in blocks if isinstance(call, BlockCall) and call.is_compiled)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return contextlib.nullcontext(), _recomputation()


@contextlib.contextmanager
def _recomputation() -> Iterator[None]:
    token = _IN_RECOMPUTATION.set(True)
    try:
        yield
    finally:
        _IN_RECOMPUTATION.reset(token)
