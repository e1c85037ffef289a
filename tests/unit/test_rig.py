"""The rig looks before it starts what the machine cannot hold."""

from pathlib import Path

import pytest

from migrate.errors import GuestError
from migrate.lab.guest_vm import GuestConfig
from migrate.lab.netns import Namespace, NetnsPair
from migrate.lab.qemu_binaries import QemuBinary
from migrate.lab.rig import Rig

END = Namespace("nowhere", "link", "10.77.1.1")
RIG = Rig(NetnsPair(END, END), Path("/nowhere"))


async def test_a_guest_that_does_not_fit_is_not_started() -> None:
    config = GuestConfig(ram_kib=1 << 32, prealloc=True)  # 4 TiB
    binary = QemuBinary(Path("/nowhere/qemu"), (7, 2, 22))
    with pytest.raises(GuestError, match="a guest of 4194304 MiB needs 4194816 MiB of free"):
        async with RIG.qemu(config, binary, END, incoming=True):
            pass
