"""The lab guest's kernel and initramfs: where they are, and how they get there."""

from dataclasses import dataclass
from pathlib import Path

from migrate.errors import GuestError, GuestOn
from migrate.lab.qemu_binaries import cache_dir, run_tool


@dataclass(frozen=True, slots=True)
class GuestImage:
    """A kernel and an initramfs that boot into the lab workload (``tools/guest``)."""

    kernel: Path
    initrd: Path


def locate() -> GuestImage:
    """Return the image in the cache, built or not by this checkout.

    Raises:
        GuestError: It was never built.
    """
    return _image_in(cache_dir() / "guest")


def build() -> GuestImage:
    """Build the image if it is missing or older than its sources, and return it.

    Blocks: milliseconds when nothing changed, seconds to minutes when the kernel is downloaded.

    Raises:
        GuestError: There is no checkout, a Debian package is missing, or the build failed.
    """
    return _image_in(Path(run_tool("build-guest", "building the lab guest")))


def _image_in(folder: Path) -> GuestImage:
    image = GuestImage(folder / "vmlinuz", folder / "initrd.img")
    for path in (image.kernel, image.initrd):
        if not path.is_file():
            raise GuestError(
                f"no lab guest at {path} (run tools/build-guest)", guest_on=GuestOn.NEITHER
            )
    return image
