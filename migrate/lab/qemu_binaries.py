"""Finds the QEMU versions that the lab runs: the machine's own, and 10.0 from the cache."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from migrate.errors import GuestError, GuestOn

PROGRAM: Final = "qemu-system-x86_64"
VERSION_LINE: Final = re.compile(r"QEMU emulator version (\d+)\.(\d+)\.(\d+)")


@dataclass(frozen=True, slots=True)
class QemuBinary:
    """A QEMU program that was run once to ask its version."""

    path: Path
    version: tuple[int, int, int]

    @property
    def short_version(self) -> str:
        """Major and minor version, e.g. ``7.2``."""
        return f"{self.version[0]}.{self.version[1]}"


def cache_dir() -> Path:
    """Return the folder of downloads and images: ``$PRECOPY_CACHE`` or ``~/.cache/precopy``."""
    configured = os.environ.get("PRECOPY_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "precopy"


def run_tool(name: str, purpose: str) -> str:
    """Run a script of the checkout's ``tools`` folder and return its last line of output.

    Blocks, up to minutes when it has to download; call it before the event loop runs.

    Raises:
        GuestError: There is no checkout (an installed package has no ``tools``), or the script
            failed.
    """
    script = Path(__file__).resolve().parents[2] / "tools" / name
    if not script.is_file():
        raise GuestError(
            f"{purpose} needs tools/{name}, which only a checkout of the project has "
            f"(not found at {script})",
            guest_on=GuestOn.NEITHER,
        )
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise GuestError(f"{purpose} failed: {reason[0]}", guest_on=GuestOn.NEITHER)
    return done.stdout.strip().splitlines()[-1]


def inspect(path: Path) -> QemuBinary:
    """Run ``path --version`` and return the binary with its version.

    Raises:
        GuestError: It cannot be run, or does not answer like a QEMU.
    """
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GuestError(f"cannot run {path}: {error}", guest_on=GuestOn.NEITHER) from error
    match = VERSION_LINE.search(done.stdout)
    if match is None:
        said = (done.stderr or done.stdout).strip()[:200]
        raise GuestError(f"{path} is no QEMU: {said!r}", guest_on=GuestOn.NEITHER)
    major, minor, micro = map(int, match.groups())
    return QemuBinary(path, (major, minor, micro))


def find_installed() -> QemuBinary:
    """Return the machine's own QEMU (Debian bookworm: 7.2).

    Raises:
        GuestError: None is installed.
    """
    found = shutil.which(PROGRAM)
    if found is None:
        raise GuestError(
            f"no {PROGRAM} on this machine (apt-get install qemu-system-x86)",
            guest_on=GuestOn.NEITHER,
        )
    return inspect(Path(found))


def find_10_0(*, fetch: bool = False) -> QemuBinary:
    """Return QEMU 10.0 from the cache.

    Args:
        fetch: Download it if it is missing; blocks meanwhile.

    Raises:
        GuestError: It is missing and ``fetch`` is false, or it cannot be fetched.
    """
    launcher = cache_dir() / "qemu-10.0" / PROGRAM
    if not launcher.exists():
        if not fetch:
            raise GuestError(
                f"no QEMU 10.0 at {launcher} (run tools/fetch-qemu10)", guest_on=GuestOn.NEITHER
            )
        launcher = Path(run_tool("fetch-qemu10", "fetching QEMU 10.0"))
    return inspect(launcher)
