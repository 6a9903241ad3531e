"""Which kernel for which processor, dtype and number of rows."""

import functools
import platform
from pathlib import Path

import torch

NARROW = (torch.bfloat16, torch.float16)

WIDEN_ROWS = 32
"""From so many rows on, weights are widened: below, that costs more than the narrow product. So many also make a
product of float32 take longer than reading its weights."""

X86 = ("x86_64", "AMD64")


@functools.cache
def multiplies_fast(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of a floating point dtype faster than such of float32.

    To have instructions for it is not enough. Intel's are fast in tiles (AMX) only: without, bfloat16 by AVX-512 takes
    twice as long as float32, and float16 is converted. On AMD's processors bfloat16 by AVX-512 takes half as long.
    """
    if dtype not in NARROW:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if platform.machine() in X86:
        if dtype is torch.float16:
            return torch.cpu._is_amx_fp16_supported()
        return torch.cpu._is_amx_tile_supported() or (is_made_by(AMD) and torch.cpu._is_avx512_bf16_supported())
    if dtype is torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


AMD, INTEL = "AuthenticAMD", "GenuineIntel"


@functools.cache
def is_made_by(vendor: str) -> bool:
    """Whether the processor is a vendor's, as far as the system says."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            return vendor in next((line for line in lines if line.startswith("vendor_id")), "")
    except OSError:  # not Linux
        return vendor in platform.processor()
