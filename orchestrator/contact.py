"""How to reach a run: its coordinator, its root, or both."""

from __future__ import annotations

import fcntl
import socket
import struct
from dataclasses import dataclass
from typing import Final

SIOCGIFADDR: Final = 0x8915  # netdevice(7)


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


def interface_of(address: str) -> str:
    """The network interface that has this IPv4 address; "" where it is another's second one, or of IPv6.

    Gloo listens at the address of the host name, which many systems resolve to loopback (127.0.1.1): other nodes would not reach the ranks.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""
