"""Holds back what a host sends: `python -m keepstep.orchestrator.late MS` in its network namespace, for as long as it should be so.

The kernel queues the packets (NFQUEUE, through iptables) and tells their numbers; after the delay each gets its verdict. Packets themselves
never come here, and none overtakes another. Speaks nfnetlink_queue (linux/netfilter/nfnetlink_queue.h) by hand: five messages of it.
"""

from __future__ import annotations

import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Final

QUEUE: Final = 0
MAX_PACKETS: Final = 10_000  # that may be on their way
NETLINK_NETFILTER: Final = 12
PACKET, VERDICT, CONFIG = (3 << 8 | message for message in range(3))  # of the subsystem 3
CFG_CMD, CFG_PARAMS, CFG_MAXLEN, CFG_MASK, CFG_FLAGS = range(1, 6)
PACKET_HDR, VERDICT_HDR = 1, 2
BIND, COPY_META, ACCEPT, REQUEST, GSO = 1, 1, 1, 1, 4
HEADER: Final = struct.Struct("=IHHII")  # length, type, flags, sequence, port


def message(kind: int, *attributes: tuple[int, bytes]) -> bytes:
    body = struct.pack(">BBH", socket.AF_UNSPEC, 0, QUEUE)
    for number, value in attributes:
        body += struct.pack("=HH", 4 + len(value), number) + value + bytes(-len(value) % 4)
    return HEADER.pack(HEADER.size + len(body), kind, REQUEST, 0, 0) + body


def packets(answer: bytes) -> Iterator[int]:
    """The numbers of the packets that one datagram of the kernel names."""
    while len(answer) >= HEADER.size:
        length, kind, *_ = HEADER.unpack_from(answer)
        attributes = answer[HEADER.size + 4 : length]
        while kind == PACKET and len(attributes) >= 4:
            size, number = struct.unpack_from("=HH", attributes)
            if number == PACKET_HDR:
                yield struct.unpack_from(">I", attributes, 4)[0]
            attributes = attributes[size + -size % 4 :]
        answer = answer[length + -length % 4 :]


def open_queue() -> socket.socket:
    kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    kernel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    kernel.bind((0, 0))
    kernel.send(message(CONFIG, (CFG_CMD, struct.pack(">BBH", BIND, 0, 0))))
    kernel.send(message(CONFIG, (CFG_PARAMS, struct.pack(">IB", 0, COPY_META))))
    kernel.send(message(CONFIG, (CFG_MAXLEN, struct.pack(">I", MAX_PACKETS))))
    kernel.send(message(CONFIG, (CFG_MASK, struct.pack(">I", GSO)), (CFG_FLAGS, struct.pack(">I", GSO))))
    return kernel


def hold_back(kernel: socket.socket, delay_s: float) -> None:
    """Never returns."""
    waiting: deque[tuple[float, int]] = deque()  # when each may go on, in order
    while True:
        patience_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        if select.select([kernel], [], [], patience_s)[0]:
            due_at = time.monotonic() + delay_s
            waiting.extend((due_at, number) for number in packets(kernel.recv(1 << 16)))
        while waiting and waiting[0][0] <= time.monotonic():
            _, number = waiting.popleft()
            kernel.send(message(VERDICT, (VERDICT_HDR, struct.pack(">II", ACCEPT, number))))


if __name__ == "__main__":
    queue = open_queue()
    sys.stdout.write("up\n")
    sys.stdout.flush()
    hold_back(queue, float(sys.argv[1]) / 1000)
