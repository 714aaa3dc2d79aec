"""The laboratory itself: its faults happen, end, and leave nothing behind."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from e2e.hosts import lab_or_skip
from e2e.live import poll_until
from keepstep.orchestrator import cgroups
from keepstep.orchestrator.lab import Host, Lab

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

TALK = """
import socket, sys
peer = socket.create_connection((sys.argv[1], int(sys.argv[2])))
peer.sendall(b"hello")
peer.recv(1)
"""
FREEZE_AND_DIE = """
import os, signal
from keepstep.orchestrator.lab import Lab
with Lab(1) as lab:
    lab.hosts[0].freeze()
    print(lab.name, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    lab_or_skip()
    with Lab(3) as lab:
        yield lab


def reaches(host: Host, address: str) -> bool:
    ping = host.command(["ping", "-q", "-c", "3", "-i", "0.05", "-W", "0.2", address])
    return subprocess.run(ping, capture_output=True, timeout=10, check=False).returncode == 0


def again(one: Host, other: Host) -> None:
    """Whoever asked in vain for the other's hardware address asks again after a second."""
    poll_until(lambda: reaches(one, other.address), f"{one.name} reaches {other.name} again")


def said_by(host: Host, *command: str) -> str:
    return subprocess.run(host.command(command), capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def test_faults_hit_whom_they_name_until_they_end(lab: Lab) -> None:
    one, two, three = lab.hosts
    assert said_by(one, "hostname") == one.name
    one.drop(to=two)
    assert [reaches(one, two.address), reaches(one, three.address), reaches(one, lab.gateway)] == [False, True, True]
    one.clear()
    again(one, two)
    two.cut()
    assert [reaches(one, two.address), reaches(one, three.address)] == [False, True]
    two.heal()
    again(one, two)
    three.loss(100)
    assert not reaches(one, three.address)
    three.clear()
    again(one, three)


def test_a_delay_is_real_and_ends(lab: Lab) -> None:
    one, two, _ = lab.hosts
    again(one, two)
    one.delay(100)
    assert round_trip_ms(one, two) >= 100
    two.delay(100)
    assert round_trip_ms(one, two) >= 200
    one.clear()
    two.clear()
    assert round_trip_ms(one, two) < 100


def round_trip_ms(one: Host, other: Host) -> float:
    """The shortest of some."""
    said = said_by(one, "ping", "-q", "-c", "5", "-i", "0.05", other.address)
    return float(said.rpartition("= ")[2].split("/")[0])


def test_a_port_is_dropped_alone(lab: Lab) -> None:
    one, two, _ = lab.hosts
    listener = subprocess.Popen(
        two.command([sys.executable, "-c", "import socket; s = socket.create_server(('', 7)); print('up', flush=True); s.accept()"]),
        stdout=subprocess.PIPE,
    )
    assert listener.stdout
    with listener.stdout as says:
        says.readline()
    connect = one.command([sys.executable, "-c", f"import socket; socket.create_connection(({two.address!r}, 7), timeout=0.5)"])
    again(one, two)
    one.drop(to=two, ports=[7])
    assert subprocess.run(connect, capture_output=True, timeout=10, check=False).returncode == 1
    again(one, two)
    one.clear()
    assert subprocess.run(connect, capture_output=True, timeout=10, check=False).returncode == 0
    assert listener.wait(10) == 0


def test_a_power_cut_says_no_word_and_the_host_comes_back_empty(lab: Lab) -> None:
    host = lab.hosts[0]
    with socket.create_server((lab.gateway, 0)) as server:
        talker = subprocess.Popen(host.command([sys.executable, "-c", TALK, lab.gateway, str(server.getsockname()[1])]))
        peer, _ = server.accept()
        with peer:
            assert peer.recv(5) == b"hello"
            said_by(host, "touch", "/tmp/left")
            host.kill()
            assert talker.wait(10) == -signal.SIGKILL
            peer.settimeout(0.3)
            with pytest.raises(TimeoutError):
                peer.recv(1)
    host.boot()
    assert said_by(host, "find", "/tmp", "-name", "left") == ""
    poll_until(lambda: reaches(host, lab.gateway), "the host is back")


def test_a_frozen_host_stands_still_and_one_without_memory_kills(lab: Lab) -> None:
    host = lab.hosts[1]
    sleeper = subprocess.Popen(host.command(["sleep", "0.2"]))
    host.freeze()
    with pytest.raises(subprocess.TimeoutExpired):
        sleeper.wait(0.5)
    host.thaw()
    assert sleeper.wait(10) == 0
    host.memory_limit(40 << 20)
    eat = host.command([sys.executable, "-c", "bytearray(200 << 20)"])
    assert subprocess.run(eat, capture_output=True, timeout=10, check=False).returncode == -signal.SIGKILL


def test_the_next_laboratory_sweeps_up_after_an_owner_that_was_killed(lab: Lab) -> None:
    owner = subprocess.run([sys.executable, "-c", FREEZE_AND_DIE], capture_output=True, text=True, timeout=30, check=False)
    assert owner.returncode == -signal.SIGKILL, owner.stderr
    base = cgroups.base_of("cgroup2")
    assert base
    left = base / owner.stdout.strip()
    assert left.is_dir()
    with Lab(1) as second:
        assert not left.exists()
        assert not reaches(second.hosts[0], lab.gateway), "laboratories do not see each other"
        assert reaches(second.hosts[0], second.gateway)
    assert reaches(lab.hosts[2], lab.gateway), "the other laboratory goes on"


def test_nothing_is_left_when_its_user_fails() -> None:
    lab_or_skip()
    lab = Lab(1)
    with pytest.raises(ZeroDivisionError):
        divide_by_nothing(lab)
    base = cgroups.base_of("cgroup2")
    assert base
    assert not (base / lab.name).exists()
    assert lab.gateway not in subprocess.check_output(["ip", "-4", "addr"], text=True)


def divide_by_nothing(lab: Lab) -> float:
    with lab, subprocess.Popen(lab.hosts[0].command(["sleep", "0"])):
        return 1 / 0
