"""The network of a laboratory: a bridge in a network namespace of its own, one port per host, one to this machine. Faults are made here,
so that no host can notice them but by what does not arrive."""

from __future__ import annotations

import ipaddress
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

MASK: Final = 24
CALL_S: Final = 30.0
BRIDGE: Final = "bridge"
UPLINK: Final = "uplink"  # the port to this machine
TABLE: Final = "table bridge lab {{\nchain faults {{\ntype filter hook forward priority 0\n{rules}\n}}\n}}\n"
PROBE: Final = f"ip link add {BRIDGE} type bridge && ip link add port0 type veth peer name port1 && nft -f -"
EVERY: Final = 10_000  # packets are lost in so many


class SwitchError(OSError):
    """The kernel refused."""


class Switch:
    """`enter`: a command prefix that puts a process where it is swept up with the rest of its laboratory."""

    def __init__(self, enter: Sequence[str], gateway: str, interface: str) -> None:
        alone = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sh", "-c", "echo up; exec sleep infinity"]
        self._process = subprocess.Popen([*enter, *alone], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        if self._process.stdout.readline() != "up\n":
            raise SwitchError("cannot make a network namespace")
        self._enter = enter
        self._interface = interface
        self._faults: dict[str, list[str]] = {}  # port -> rules
        self._late: dict[str, tuple[int, subprocess.Popen[str]]] = {}  # port -> process in the host's namespace, who holds back
        self._ip(f"link add {BRIDGE} type bridge", f"link set {BRIDGE} up")
        _run(["ip", "link", "add", interface, "type", "veth", "peer", "name", UPLINK, "netns", str(self._process.pid)])
        self._ip(f"link set {UPLINK} master {BRIDGE} up")
        _run(["ip", "-batch", "-"], f"addr add {gateway}/{MASK} dev {interface}\nlink set {interface} up\n")

    @staticmethod
    def missing() -> str:
        """Why this machine cannot have one; "" if it can."""
        rules = TABLE.format(rules=f'iifname "a" numgen random mod {EVERY} < 1 drop')
        tried = subprocess.run(
            ["unshare", "--net", "--pid", "--fork", "--mount", "--uts", "--ipc", "sh", "-c", PROBE],
            input=rules, capture_output=True, text=True, timeout=CALL_S, check=False,
        )  # fmt: skip
        return "" if tried.returncode == 0 else f"namespaces, a bridge or nftables are missing: {tried.stderr.strip()}"

    def plug(self, port: str, pid: int, address: str) -> None:
        """Gives the namespace of process `pid` an `eth0` with this address. It keeps its MAC: others remember it from before."""
        mac = "02:00:" + ":".join(f"{byte:02x}" for byte in ipaddress.IPv4Address(address).packed)
        self._ip(
            f"link add {port} type veth peer name eth0 address {mac} netns {pid}",
            f"link set {port} master {BRIDGE} up",
        )
        _run(inside(pid, "ip", "-batch", "-"), f"addr add {address}/{MASK} dev eth0\nlink set eth0 up\n")

    def unplug(self, port: str) -> None:
        self.clear(port)
        self._ip(f"link del {port}")

    def cut(self, port: str) -> None:
        self._ip(f"link set {port} down")

    def heal(self, port: str) -> None:
        self._ip(f"link set {port} up")

    def drop(self, port: str, to: str, tcp_ports: Sequence[int]) -> None:
        """What comes in at `port` is lost: all of it, or what goes out at port `to`, or only TCP from and to some TCP ports."""
        where = f'iifname "{port}"' + (f' oifname "{to}"' if to else "")
        among = "{ " + ", ".join(map(str, tcp_ports)) + " }"
        what = (f"tcp dport {among}", f"tcp sport {among}") if tcp_ports else ("",)
        self._add(port, *(f"{where} {which} drop" for which in what))

    def lose(self, port: str, percent: float) -> None:
        share = round(percent * EVERY / 100)
        chance = f"numgen random mod {EVERY} < {share}" if share < EVERY else ""
        self._add(port, f'iifname "{port}" {chance} drop', f'oifname "{port}" {chance} drop')

    def delay(self, port: str, pid: int, ms: float) -> None:
        """What the namespace of process `pid` sends is late. It happens there: nftables cannot queue what a bridge forwards."""
        self._end_delay(port)
        hold = [*self._enter, "setpriv", "--pdeathsig", "KILL", *inside(pid, sys.executable, "-m", "keepstep.orchestrator.late", str(ms))]
        holder = subprocess.Popen(hold, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        self._late[port] = (pid, holder)
        assert holder.stdout
        if holder.stdout.readline() != "up\n":
            raise SwitchError("the kernel has no NFQUEUE")
        _run(inside(pid, "iptables", "-A", "OUTPUT", "-o", "eth0", "-j", "NFQUEUE", "--queue-num", "0"))

    def _end_delay(self, port: str) -> None:
        if port in self._late:
            pid, holder = self._late.pop(port)
            _run(inside(pid, "iptables", "-F", "OUTPUT"))
            holder.kill()
            holder.communicate(timeout=CALL_S)

    def clear(self, port: str) -> None:
        self._end_delay(port)
        if self._faults.pop(port, None):
            self._apply()

    def close(self) -> None:
        """Its processes must be dead."""
        subprocess.run(["ip", "link", "del", self._interface], capture_output=True, timeout=CALL_S, check=False)  # may be gone with it
        for process in (self._process, *(holder for _, holder in self._late.values())):
            process.communicate(timeout=CALL_S)

    def _add(self, port: str, *rules: str) -> None:
        self._faults.setdefault(port, []).extend(rules)
        self._apply()

    def _apply(self) -> None:
        """All rules at once, instead of those before."""
        rules = "\n".join(rule for of_port in self._faults.values() for rule in of_port)
        _run(inside(self._process.pid, "nft", "-f", "-"), "flush ruleset\n" + TABLE.format(rules=rules))

    def _ip(self, *commands: str) -> None:
        _run(inside(self._process.pid, "ip", "-batch", "-"), "\n".join(commands) + "\n")


def inside(pid: int, *command: str) -> list[str]:
    """A command in the network namespace of a process. (`ip netns exec` would hide /sys/fs/cgroup.)"""
    return ["nsenter", "-t", str(pid), "-n", *command]


def _run(command: Sequence[str], text: str = "") -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=CALL_S, check=False)
    if done.returncode:
        raise SwitchError(f"{' '.join(command)}: {done.stderr.strip()}\n{text}")
