"""How to reach a run: its coordinator, its root, or both."""

from __future__ import annotations

import socket
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Contact:
    root: str = ""
    url: str = ""
    token: str = ""


def address_towards(host: str) -> str:
    """Our own address on the way to a host: where the other nodes, which take the same way, reach us. Raises OSError without a route."""
    family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # UDP: nothing is sent
        return str(probe.getsockname()[0])
