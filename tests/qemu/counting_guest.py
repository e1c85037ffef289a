"""The guest of most tests with QEMU, a hundred instructions long.

It fills memory with noise that does not compress, then wakes up 18 times a second, counts, and
writes to its hot pages: it boots in a third of a second, needs next to no processor, and its
counter shows whether it really runs.
"""

import struct
from typing import Final

COUNTER_ADDRESS: Final = 0x200000
_NOISE_DWORDS_OFFSET: Final = 0x20
_HOT_PAGES_OFFSET: Final = 0x24

_KERNEL: Final = bytes.fromhex(
    # Multiboot header: magic, flags (addresses given), checksum, header, load, 0, 0, entry;
    # then the number of noise words, the number of hot pages, and a flat GDT.
    "02b0ad1b00000100fe4f51e4000010000000100000000000000000004c001000"
    "1111111122222222 0000000000000000ffff0000009acf00ffff00000092cf00"
    # GDTR, IDTR (vectors 0 to 8 at 0x1000)
    "170028001000 470000100000"
    # cli; mov esp,0x90000; lgdt; ljmp 8; ds = es = ss = 16
    "fa bc00000900 0f011540001000 ea600010000800 66b81000 8ed8 8ec0 8ed0"
    # edi = 0x400000; ecx = noise words; eax = seed; do { noise(); stosd } while (--ecx)
    "bf00004000 8b0d20001000 b891f44525 e853000000 ab e2f8"
    # vector 8, the BIOS's timer interrupt: selector 8, interrupt gate
    "b9e8001000 66890d40100000 66c705421000000800 66c70544100000008e c1e910 66890d46100000"
    # lidt; sti; idle: hlt; ++counter; for (edi = 0x400000, ecx = hot pages; ecx; --ecx,
    # edi += 4096) [edi] += ecx; jmp idle
    "0f011d46001000 fb f4 ff0500002000 bf00004000 8b0d24001000 e3ec"
    "010f 81c700100000 e2f6 ebe0"
    # noise: xorshift of eax; ret
    "89c2 c1e20d 31d0 89c2 c1ea11 31d0 89c2 c1e205 31d0 c3"
    # timer: acknowledge at the interrupt controller; iret
    "50 b020 e620 58 cf"
)


def kernel(noise_mib: int, hot_pages: int) -> bytes:
    """The guest: ``noise_mib`` of incompressible pages, the first ``hot_pages`` of them hot."""
    image = bytearray(_KERNEL)
    struct.pack_into("<I", image, _NOISE_DWORDS_OFFSET, max(1, noise_mib << 18))
    struct.pack_into("<I", image, _HOT_PAGES_OFFSET, hot_pages)
    return bytes(image)
