"""A laboratory: hosts on this one machine, each with its own network, name, processes and memory, that can be cut off, frozen and killed.

    with Lab(4, shared=(root,)) as lab:
        agent = subprocess.Popen(lab.hosts[0].command(["keepstep", "agent", "--root", str(root)]))
        lab.hosts[0].cut()                          # as if somebody pulled its cable

A host is a network, UTS, PID, mount and IPC namespace and a cgroup, plugged into a bridge that has a namespace of its own (switch.py).
Hosts see each other, and this machine at `Lab.gateway`, and nothing else. Of this machine's own settings nothing is touched: it gets one
more interface, which is gone afterwards. Needs root.

Nothing has a name that could outlive its owner, but for cgroups: all processes die with the thread that made the lab, namespaces with
their processes, and the next lab sweeps the cgroups of those whose owner is dead, with whatever was frozen in them.
"""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from . import cgroups
from .cgroups import Cgroup
from .processes import ENV_PARENT
from .switch import CALL_S, MASK, Switch, SwitchError

TOOLS: Final = ("ip", "nft", "iptables", "nsenter", "unshare", "setpriv", "mount")
PREFIX: Final = "keepstep-lab-"
TMP_SIZE: Final = "256m"
MAX_HOSTS: Final = 99
GATEWAY: Final = 254  # last part of its address

# Runs as root of this machine: enters the host's cgroup ($1 ... "--"), then becomes the rest.
ENTER: Final = 'while [ "$1" != -- ]; do echo $$ > "$1/cgroup.procs"; shift; done; shift; exec "$@"'

# Runs as process 1 of a host: NAME, NUMBER_OF_FOLDERS, HOSTS, then the folders below /tmp that it shares with this machine. /mnt becomes
# its /tmp, and is no place of its own. Ignoring SIGCHLD makes the kernel reap the orphans that fall to process 1.
BOOT: Final = f"""
hostname "$1"; hosts=$2; shift 2
mount -t tmpfs -o size={TMP_SIZE},mode=1777 tmpfs /mnt
for folder in "$@"; do mkdir -p "/mnt${{folder#/tmp}}"; mount --bind "$folder" "/mnt${{folder#/tmp}}"; done
mount --move /mnt /tmp
printf %s "$hosts" > /tmp/hosts; chmod 644 /tmp/hosts; mount --bind /tmp/hosts /etc/hosts; rm /tmp/hosts
if [ -e /etc/nsswitch.conf ]; then
  sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf > /tmp/nsswitch; mount --bind /tmp/nsswitch /etc/nsswitch.conf; rm /tmp/nsswitch
fi
ip link set lo up
echo up
exec env --ignore-signal=CHLD sleep infinity
"""
NAMESPACES: Final = ("--net", "--uts", "--ipc", "--mount", "--pid")


class Host:
    """One machine of the laboratory. Its network faults are a switch's and a cable's: they add up until `heal` or `clear`."""

    def __init__(self, lab: Lab, number: int) -> None:
        self.name = f"host{number}"
        self.address = lab.address(number)
        self.is_up = False
        self._lab = lab
        self._port = f"p{number}"
        self._group = Cgroup(f"{lab.name}/{self.name}")
        self._group.make()
        self._starter: subprocess.Popen[str] | None = None
        self._pid1 = 0

    def command(self, argv: Sequence[str]) -> list[str]:
        """What to run on this machine so that `argv` runs on the host, with this environment and standard streams.

        The process dies with the one that was started here, whose exit code is its own. Signals are for the process itself:
        `host.command(["kill", "-TERM", pid])`, with the pid that it has on its host.
        """
        assert self.is_up, f"{self.name} is off"
        flags = ["-t", str(self._pid1), "-n", "-u", "-p", "-i", "-m"]
        # The parent that the environment may name is not there as seen from the host.
        enter = ["env", "-u", ENV_PARENT, "nsenter", *flags, f"--wd={os.getcwd()}", "setpriv", "--pdeathsig", "KILL"]
        return [*into(self._group), *enter, *argv]

    def pid_here(self, pid: int) -> int:
        """The pid that one of its processes has on this machine. Raises LookupError when there is none."""
        for known in self._group.pids():
            if _namespaced_pid(known) == pid:
                return known
        raise LookupError(f"{self.name} has no process {pid}")

    def boot(self) -> None:
        """Switches it on, empty."""
        assert not self.is_up, f"{self.name} is on"
        unshare = ["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, "--fork", "--kill-child=KILL", "--mount-proc"]
        init = ["sh", "-ec", BOOT, "boot", self.name, self._lab.etc_hosts(), *self._lab.shared]
        self._starter = subprocess.Popen(
            [*into(self._group), *unshare, *init], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self._starter.stdout
        if self._starter.stdout.readline() != "up\n":
            _, said = self._starter.communicate(timeout=CALL_S)
            raise SwitchError(f"{self.name} does not start: {said.strip()}")
        (self._pid1,) = (pid for pid in self._group.pids() if pid != self._starter.pid)
        self._lab.switch.plug(self._port, self._pid1, self.address)
        self.is_up = True

    def kill(self) -> None:
        """A power cut: no packet leaves it any more, then every process is gone."""
        self.cut()
        self.clear()
        self._group.kill()
        self.bury()
        self._lab.switch.unplug(self._port)

    def bury(self) -> None:
        """Its processes are dead."""
        self.is_up = False
        if self._starter:
            self._starter.communicate(timeout=CALL_S)

    def cut(self) -> None:
        """Pulls the cable."""
        self._lab.switch.cut(self._port)

    def heal(self) -> None:
        """The cable is back, and every fault of the network that this host was given is over."""
        self._lab.switch.heal(self._port)
        self.clear()

    def drop(self, to: Host | None = None, ports: Iterable[int] | None = None) -> None:
        """One way: what this host sends is lost, all of it or what goes to one other host, of all or of TCP from and to `ports`."""
        self._lab.switch.drop(self._port, to._port if to else "", tuple(ports or ()))

    def loss(self, percent: float) -> None:
        """So many packets are lost, in each direction."""
        self._lab.switch.lose(self._port, percent)

    def delay(self, ms: float) -> None:
        """Each IP packet that it sends to others is late by so much; none overtakes another."""
        self._lab.switch.delay(self._port, self._pid1, ms)

    def clear(self) -> None:
        """Ends `drop`, `loss` and `delay`."""
        self._lab.switch.clear(self._port)

    def freeze(self) -> None:
        """Stands still as a whole, as a paused virtual machine does; its kernel still answers on the network."""
        self._group.freeze()

    def thaw(self) -> None:
        self._group.thaw()

    def memory_limit(self, num_bytes: int) -> None:
        """Of all its processes together; beyond it the kernel's OOM killer acts."""
        self._group.limit_memory(num_bytes)


class Lab:
    """`num_hosts` hosts, switched on. `shared`: folders below /tmp that they see as this machine does; what is elsewhere, they see anyway.

    Raises SwitchError where this machine cannot do it (see `missing`). Main thread only: the hosts die with the thread that made them.
    """

    def __init__(self, num_hosts: int, *, shared: Iterable[Path] = ()) -> None:
        assert 1 <= num_hosts <= MAX_HOSTS
        sweep()
        self.name = own_name()
        self._network = _free_network()
        self.gateway = self.address(GATEWAY)
        self.shared = _below_tmp((*shared, Path(sys.prefix), Path(sys.base_prefix), Path(__file__).parents[1], Path.cwd()))
        self._num_hosts = num_hosts
        self._group = Cgroup(self.name)
        self._switch: Switch | None = None
        self.hosts: tuple[Host, ...] = ()

    @staticmethod
    def missing() -> str:
        """Why no laboratory can be set up on this machine; "" if one can."""
        if os.geteuid() != 0:
            return "not root"
        if absent := [tool for tool in TOOLS if not shutil.which(tool)]:
            return f"no {', '.join(absent)} (Debian: apt-get install iproute2 iptables nftables util-linux)"
        return cgroups.missing() or Switch.missing()

    def __enter__(self) -> Lab:
        if why := self.missing():
            raise SwitchError(f"no laboratory here: {why}")
        self._group.make()
        try:
            self._switch = self._make_switch()
            self.hosts = tuple(Host(self, number) for number in range(1, self._num_hosts + 1))
            for host in self.hosts:
                host.boot()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._remove()

    @property
    def switch(self) -> Switch:
        assert self._switch, "the laboratory is not set up"
        return self._switch

    def address(self, number: int) -> str:
        return str(self._network[number])

    def etc_hosts(self) -> str:
        named = [(host.address, host.name) for host in self.hosts]
        return "".join(f"{address} {name}\n" for address, name in (("127.0.0.1", "localhost"), (self.gateway, "gateway"), *named))

    def _make_switch(self) -> Switch:
        group = Cgroup(f"{self.name}/switch")
        group.make()
        return Switch(into(group), self.gateway, f"lab-{self.name[-10:]}")

    def _remove(self) -> None:
        """Nothing is left, however far it got."""
        self._group.kill()
        for host in self.hosts:
            host.bury()
        if self._switch:
            self._switch.close()
        self._group.remove()


def into(group: Cgroup) -> list[str]:
    """Prefix of a command that is to run in this cgroup."""
    return ["sh", "-c", ENTER, "enter", *map(str, group.folders), "--"]


def own_name() -> str:
    """Of a cgroup that is ours as long as we live, and anybody's to sweep afterwards."""
    return f"{PREFIX}{os.getpid()}-{_started_at(os.getpid())}-{os.urandom(2).hex()}"


def sweep() -> None:
    """Removes what is left of laboratories whose owner is dead: what was frozen in them could not die with it."""
    base = cgroups.base_of("cgroup2")
    for folder in base.glob(f"{PREFIX}*") if base else ():
        pid, started_at, _ = folder.name.removeprefix(PREFIX).split("-")
        if _started_at(int(pid)) != started_at:
            group = Cgroup(folder.name)
            group.kill()
            group.remove()


def _namespaced_pid(pid: int) -> int:
    """What a process calls itself; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    pids = next(line for line in lines if line.startswith("NSpid:")).split()[1:]
    return int(pids[-1]) if len(pids) > 1 else 0


def _started_at(pid: int) -> str:
    """Tells a process from later ones with the same pid; "" when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return stat.rpartition(")")[2].split()[19]


def _free_network() -> ipaddress.IPv4Network:
    """A /24 of 10.0.0.0/8 that this machine has no route to; two laboratories that begin at once look at different ones first."""
    routes = json.loads(subprocess.run(["ip", "-json", "-4", "route"], capture_output=True, check=True, timeout=CALL_S).stdout)
    taken = [ipaddress.IPv4Network(route["dst"]) for route in routes if route["dst"] != "default"]
    for number in range(1 << 16):
        network = ipaddress.IPv4Network(((10 << 24) + ((os.getpid() + number) % (1 << 16) << 8), MASK))
        if not any(network.overlaps(other) for other in taken):
            return network
    raise SwitchError("every /24 of 10.0.0.0/8 is routed somewhere")


def _below_tmp(folders: Iterable[Path]) -> tuple[str, ...]:
    """Those that a host's own /tmp would hide, without those inside another."""
    tmp, found = Path("/tmp"), list[Path]()
    for folder in sorted({folder.resolve() for folder in folders}):
        if tmp in folder.parents and not any(folder.is_relative_to(outer) for outer in found):
            found.append(folder)
    return tuple(map(str, found))
