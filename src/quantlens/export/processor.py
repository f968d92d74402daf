"""What this processor's 8-bit multiplications do to sums.

x86 processors without VNNI or AMX (AVX2, the first AVX-512) multiply unsigned by signed bytes in pairs and add the two
products in 16 bits, which saturates at 32767: 255 · 127 · 2 is 64770. Runtimes use that instruction as it is fast, and
their logits then differ from the measured ones by far more than rounding. With weights of 7 bits (±64) the pair stays
within 32640: a W7A8 file is right on every processor, whatever its session options. A file says in its metadata
(``saturating``) whether it has wider weights.
"""

from __future__ import annotations

import functools
import platform

EXACT = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
"""Linux's names of the instructions that add in 32 bits."""


@functools.cache
def saturates() -> bool:
    """Whether sums of u8 · s8 products saturate here. Of an x86 processor whose instructions are not known, yes."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686", "x86"):
        return False
    return not EXACT & _flags()


def _flags() -> frozenset[str]:
    """The processor's instruction sets as Linux lists them; empty where it does not."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            line = next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        return frozenset()
    return frozenset(line.partition(":")[2].split())
