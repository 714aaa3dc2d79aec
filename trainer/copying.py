"""How tensors get into a staging buffer.

On a CPU: at once. On a GPU: into pinned memory, on a stream of its own, while the next forward and backward passes run; they only read what
is copied. Whoever changes a tensor (the optimizer) waits first, and so does whoever hands the buffer over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import torch
from torch import Tensor

Wait: TypeAlias = Callable[[], None]
Copy: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor]], Wait | None]
_PINNED: Final = 2  # buffers of a rank


class Copier:
    """Copies into host memory that is used again and again. Not thread-safe."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pinned: list[Tensor] = []  # the first one in each buffer

    def __call__(self, destinations: Sequence[Tensor], sources: Sequence[Tensor]) -> Wait | None:
        """Begins to fill `destinations`, which share one memory; what it returns waits until they are full, None: they are.

        Until then no source may change.
        """
        if not destinations:
            return None
        with torch.no_grad():
            if any(source.is_cuda for source in sources):
                return self._begin(destinations, sources)
            torch._foreach_copy_(list(destinations), list(sources))
        return None

    def _begin(self, destinations: Sequence[Tensor], sources: Sequence[Tensor]) -> Wait:
        device = next(source.device for source in sources if source.is_cuda)
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pin(destinations)
        self._stream.wait_stream(torch.cuda.current_stream(device))  # what the last update launched is finished first
        with torch.cuda.stream(self._stream):
            torch._foreach_copy_(list(destinations), list(sources), non_blocking=True)
            for source in sources:
                if source.is_cuda:
                    source.record_stream(self._stream)  # its memory is not given to anybody else before the copy is over
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._stream)
        return copied.synchronize

    def _pin(self, destinations: Sequence[Tensor]) -> None:
        """The whole buffer, once: a copy from a GPU into memory that may be paged out would wait for every piece."""
        first = min(destinations, key=Tensor.data_ptr)
        address, last = first.data_ptr(), max(destinations, key=Tensor.data_ptr)
        if any(pinned.data_ptr() == address for pinned in self._pinned):
            return
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if len(self._pinned) == _PINNED:
            torch.cuda.check_error(int(runtime.cudaHostUnregister(self._pinned.pop(0).data_ptr())))
        torch.cuda.check_error(int(runtime.cudaHostRegister(address, last.data_ptr() + last.nbytes - address, 0)))
        self._pinned.append(first)  # keeps the buffer mapped for as long as it is registered
