"""Every random stream of a rank: captured as JSON, restored exactly, or derived when there is nothing exact to restore.

Python's random, NumPy's global generator, torch's CPU generator, the generator of the CUDA device that the rank computes on, and whether
DTensor's tracker exists. The tracker keeps no numbers of its own (torch 2.13), but its making is an event of the streams: the first random
operation on a DTensor makes it, and that gives all ranks the stream of rank 0. Made once more after a restart, it would do so again.
"""

from __future__ import annotations

import base64
import hashlib
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import _random as dtensor

from keepstep.storage.canonical import canonical_json, sha256_hex

from .registry import Part

_PREFIX: Final = "rng."  # of the parts' names


class RngMismatch(ValueError):
    """The saved streams are not those of this process; going on would silently train something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """One generator, or all of one kind."""

    capture: Callable[[], Any]
    restore: Callable[[Any], None]
    check: Callable[[Any], Iterable[str]] = lambda saved: ()


def seed_everything(*facts: int) -> None:
    """Streams that depend on `facts` alone, e.g. (seed, rank): dropout masks must differ between ranks."""
    digest = hashlib.sha256(" ".join(map(str, facts)).encode()).digest()
    random.seed(digest)
    np.random.seed(np.frombuffer(digest, dtype=np.uint32))
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))  # CUDA too


def capture() -> dict[str, Any]:
    """All streams by name, as JSON."""
    return {name: stream.capture() for name, stream in STREAMS.items()}


def restore(saved: Mapping[str, Any]) -> None:
    """Puts all streams back. Raises RngMismatch, before it changes any, when one is missing or of another machine."""
    if wrong := set(STREAMS) ^ set(saved):
        raise RngMismatch(f"the checkpoint's random streams lack or add {sorted(wrong)}: refusing to train on with other ones")
    if problems := [problem for name, stream in STREAMS.items() for problem in stream.check(saved[name])]:
        raise RngMismatch(f"the checkpoint's random streams: {'; '.join(problems)}")
    for name, stream in STREAMS.items():
        stream.restore(saved[name])


def digest(saved: Mapping[str, Any]) -> str:
    """SHA-256 of captured streams."""
    return sha256_hex(canonical_json(saved))


def parts(derive: Callable[[], str] | None = None) -> list[Part]:
    """A part per stream, named "rng.python" and so on.

    Args:
        derive: at another world size: makes all streams anew and says how. None: such a checkpoint is refused.
    """
    return [
        Part(
            name=f"{_PREFIX}{name}",
            capture=stream.capture,
            restore=stream.restore,
            check=stream.check,
            per_rank=name != "dtensor",  # DTensors' operations are those of all ranks
            elsewhere=None if derive is None else lambda saved: derive(),
        )
        for name, stream in STREAMS.items()
    ]


def derived_parts(derive: Callable[[], None]) -> list[Part]:
    """Of a run whose streams are made anew by `derive` between any two steps: at every world size, whatever was saved."""

    def elsewhere(saved: Iterable[Any]) -> str:
        derive()
        return ""

    return [
        Part(
            name=f"{_PREFIX}{name}",
            capture=stream.capture,
            restore=lambda saved: derive(),
            per_rank=True,  # ranks of a run that was not like that had streams of their own
            elsewhere=elsewhere,
        )
        for name, stream in STREAMS.items()
    ]


def streams_in(parts: Mapping[str, Any]) -> dict[str, Any]:
    """What `restore` takes, out of the parts of a rank's state in a checkpoint."""
    return {name.removeprefix(_PREFIX): saved for name, saved in parts.items() if name.startswith(_PREFIX)}


def _capture_python() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    return {"version": version, "words": _pack(np.array(words, dtype=np.uint32)), "gauss": None if gauss is None else float(gauss).hex()}


def _restore_python(saved: Mapping[str, Any]) -> None:
    words = tuple(int(word) for word in _unpack(saved["words"]))
    random.setstate((saved["version"], words, None if saved["gauss"] is None else float.fromhex(saved["gauss"])))


def _check_python(saved: Mapping[str, Any]) -> Iterable[str]:
    words = tuple(int(word) for word in _unpack(saved["words"]))
    random.Random(0).setstate((saved["version"], words, None if saved["gauss"] is None else float.fromhex(saved["gauss"])))
    return ()


def _capture_numpy() -> dict[str, Any]:
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    return {"name": name, "keys": _pack(keys), "position": int(position), "has_gauss": int(has_gauss), "cached": float(cached).hex()}


def _restore_numpy(saved: Mapping[str, Any]) -> None:
    keys = _unpack(saved["keys"])
    np.random.set_state((saved["name"], keys, saved["position"], saved["has_gauss"], float.fromhex(saved["cached"])))


def _check_numpy(saved: Mapping[str, Any]) -> Iterable[str]:
    keys, position = _unpack(saved["keys"]), saved["position"]
    np.random.RandomState(0).set_state((saved["name"], keys, position, saved["has_gauss"], float.fromhex(saved["cached"])))
    if not 0 <= position <= len(keys):  # NumPy would read beside its memory
        yield f"it stands at number {position} of {len(keys)}"


def _check_torch(saved: str) -> Iterable[str]:
    try:
        torch.Generator().set_state(_unpack_tensor(saved))
    except RuntimeError as error:
        yield f"no state of torch's generator: {error}"


def _cuda_state() -> torch.Tensor | None:
    """Of the device that this rank computes on. Nodes have different numbers of them; what others draw is theirs to save."""
    return torch.cuda.get_rng_state(torch.cuda.current_device()) if torch.cuda.is_available() else None


def _capture_cuda() -> str | None:
    state = _cuda_state()
    return None if state is None else _pack_tensor(state)


def _restore_cuda(saved: str | None) -> None:
    if saved is not None:
        torch.cuda.set_rng_state(_unpack_tensor(saved), torch.cuda.current_device())


def _check_cuda(saved: str | None) -> Iterable[str]:
    here = _cuda_state()
    if saved is not None and here is None:
        yield "it holds the stream of a CUDA device, and this process has none"
    elif saved is None and here is not None:
        yield "it was saved by a process without CUDA, and this one computes on a CUDA device"
    elif saved is not None and here is not None and (size := _unpack_tensor(saved).numel()) != here.numel():
        yield f"its stream of a CUDA device has {size} bytes, here they have {here.numel()}"


def _capture_tracker() -> dict[str, Any] | None:
    return None if dtensor._rng_tracker is None else {"distributes": dtensor._rng_tracker.distribute_region_enabled}


def _restore_tracker(saved: Mapping[str, Any] | None) -> None:
    dtensor._rng_tracker = None
    if saved is not None:
        mesh = init_device_mesh("cuda", (dist.get_world_size(),))
        dtensor._rng_tracker = dtensor.OffsetBasedRNGTracker(mesh, run_state_sync=False)
        dtensor._rng_tracker.distribute_region_enabled = saved["distributes"]


def _check_tracker(saved: Mapping[str, Any] | None) -> Iterable[str]:
    if saved is not None and not isinstance(saved["distributes"], bool):
        yield f"whether the tracker distributes is {saved['distributes']!r}"
    if saved is not None and _cuda_state() is None:
        yield "DTensors drew numbers on CUDA devices, and this process has none"


def _pack(array: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype="<u4").tobytes()).decode()


def _unpack(text: str) -> np.ndarray[Any, np.dtype[np.uint32]]:
    return np.frombuffer(base64.b64decode(text), dtype="<u4").astype(np.uint32)


def _pack_tensor(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _unpack_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


STREAMS: Final[Mapping[str, Stream]] = {
    "python": Stream(capture=_capture_python, restore=_restore_python, check=_check_python),
    "numpy": Stream(capture=_capture_numpy, restore=_restore_numpy, check=_check_numpy),
    "torch": Stream(
        capture=lambda: _pack_tensor(torch.get_rng_state()),
        restore=lambda saved: torch.set_rng_state(_unpack_tensor(saved)),
        check=_check_torch,
    ),
    "cuda": Stream(capture=_capture_cuda, restore=_restore_cuda, check=_check_cuda),
    "dtensor": Stream(capture=_capture_tracker, restore=_restore_tracker, check=_check_tracker),
}
