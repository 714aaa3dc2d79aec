"""Virtual environments of the peers, one each below .build/peers, made when they are first needed. They see this environment's packages
(torch above all) behind their own, so nothing is fetched twice and no peer decides the version of anything of ours.

    python benchmarks/peers/environments.py torchft nvrx     make them, or say why not
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Final

HOME: Final = Path(__file__).resolve().parents[2] / ".build" / "peers"
LOG: Final = "install.log"
# Versions that were driven with this torch. Undeclared needs of a peer stand behind it.
PACKAGES: Final[Mapping[str, tuple[str, ...]]] = {
    "torchft": ("torchft==0.2.0",),
    "nvrx": ("nvidia-resiliency-ext==0.4.1",),
    "dlrover": ("dlrover[torch,k8s]==0.6.1", "protobuf", "setuptools<81", "psutil"),
    "ray": ("ray[train]==2.60.0",),
}


class NotInstalled(RuntimeError):
    """A peer's packages cannot be had here; says the last line of the reason."""


def bin_of(name: str) -> Path:
    """The folder of a peer's python and commands.

    Raises NotInstalled.
    """
    folder = HOME / name
    done = folder / ".installed"
    wanted = "\n".join(PACKAGES[name])
    if not done.exists() or done.read_text() != wanted:
        make(folder, PACKAGES[name])
        done.write_text(wanted)
    return folder / "bin"


def make(folder: Path, packages: tuple[str, ...]) -> None:
    """Raises NotInstalled; the whole output lies in install.log."""
    folder.mkdir(parents=True, exist_ok=True)
    inherit(folder)
    # pip must neither move torch nor fetch what would pull in a build for GPUs.
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pinned, (folder / LOG).open("w") as log:
        pinned.write(f"torch=={version('torch').partition('+')[0]}\n")
        pinned.flush()
        command = [folder / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", "-c", pinned.name, *packages]
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode:
            raise NotInstalled(f"pip: {last_error((folder / LOG).read_text())}")


def inherit(folder: Path) -> None:
    """An empty environment whose search path ends in our site-packages, as --system-site-packages would have it for the system's."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    inside = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    Path(inside, "inherited.pth").write_text(sysconfig.get_path("purelib") + os.linesep)


def last_error(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no output")[:160]


def main() -> None:
    for name in sys.argv[1:] or PACKAGES:
        try:
            print(f"{name}: {bin_of(name)}", flush=True)
        except NotInstalled as error:
            print(f"{name}: not installed, {error}", flush=True)


if __name__ == "__main__":
    main()
