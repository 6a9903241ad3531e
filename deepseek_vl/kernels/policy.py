"""Which kernel for which processor, dtype and number of rows.

`TABLE` has all rules. Two things override it for models that are loaded later: `set_kernels`, and the environment
variable `DEEPSEEK_VL_KERNELS`, as in `DEEPSEEK_VL_KERNELS=linear=plain,attention_many=widening`.
"""

import functools
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch.nn.attention import SDPBackend

Value = TypeVar("Value")

NARROW = (torch.bfloat16, torch.float16)

MANY_ROWS = 32
"""From this many rows on, a product takes longer than reading its weights, and converting them adds little to it."""

GPU_ATTENTION = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
"""The attention kernels that PyTorch may choose from on CUDA GPUs. cuDNN's, which it prefers on Hopper, plans anew for
each length of the keys: 2.7 ms a call, 64 of the 92 ms of a token of the 1.3B model. H100, PyTorch 2.11."""

WIDENED_ROWS = (("x86 avx512", MANY_ROWS), ("x86 avx2", 6), ("", MANY_ROWS))
"""The number of rows from which narrow weights are widened, by the features that a processor must have; the first entry
that fits counts. With AVX2 alone each further row of a narrow product takes as long as the first: 8 rows through the 24
layers of the 1.3B model take 805 ms in float16, 529 widened, and 420 in float32. Sapphire Rapids limited to AVX2, two
cores."""

INT4_WIDENED_ROWS = 48
"""The number of rows from which int4 weights are widened. PyTorch's kernel takes 0.7 ms for each row of a layer of 2048
by 11008, widening it 33. Sapphire Rapids, one core; with AVX2 alone it was not measured."""

DTYPES = (
    ("bf16", torch.bfloat16),
    # One row through the 24 layers of the 1.3B model takes 143 ms in float16, in which it is published, 185 in
    # bfloat16 and 296 in float32. AMD EPYC (Zen 2), two cores.
    ("x86 avx2", torch.float16),
    ("", torch.float32),
)
"""The default dtype of a model, by the features that a processor must have; the first entry that fits counts. A token
takes as long as reading the weights; products of many rows widen them, or are fast as they are."""

KERNELS = {
    "linear": ("plain", "widening", "onednn"),
    "attention_few": ("plain", "widening"),
    "attention_many": ("plain", "widening"),
    "int8": ("onednn", "onednn-7-bit", "fbgemm", "fbgemm-7-bit"),
}
"""The kernels of linear layers with many rows (few are plain), of attention with few and many queries, and of int8.

`plain` computes in the dtype of its input, `widening` in float32; `onednn` and `fbgemm` name the library that computes
the product, and `7-bit` the width of quantised inputs."""

TABLE = (
    # float32. MKL's products, which PyTorch uses, take a fifth longer on AMD's AVX-512. AMD EPYC, two cores.
    ("linear", (torch.float32,), "amd avx512 onednn", "onednn"),
    # bfloat16 in tiles (AMX) takes a fifth of float32's time, attention half. Sapphire Rapids, two cores, 640 rows.
    ("linear attention_many", (torch.bfloat16,), "amx", "plain"),
    # AVX-512's instructions for bfloat16 take half of float32's time on AMD's processors (EPYC, two cores), but twice
    # as long on Intel's: a prompt of the 1.3B model 25 s instead of 11, with int8 16 instead of 5.5. Xeon of 2.3 GHz.
    ("linear attention_many", (torch.bfloat16,), "amd avx512_bf16", "plain"),
    # float16 is converted, unless there are tiles for it. Not measured: these tiles, and Arm, where oneDNN tells.
    ("linear attention_many", (torch.float16,), "amx_fp16", "plain"),
    ("linear attention_many", (torch.bfloat16,), "arm bf16", "plain"),
    ("linear attention_many", (torch.float16,), "arm fp16", "plain"),
    ("linear attention_many", NARROW, "", "widening"),
    # Few queries. Xeon of 2.3 GHz without AMX, 24 layers of 16 heads, 660 positions, in bfloat16: 4 ms instead of 15
    # for one, 24 instead of 27 for 20, 65 instead of 51 for 64; in float16 one takes half of float32's time. Sapphire
    # Rapids: an eighth of it for one, a quarter for 20. On AMD's EPYC float32 is the faster.
    ("attention_few", NARROW, "intel", "plain"),
    ("attention_few", NARROW, "", "widening"),
    # oneDNN's product in tiles (AMX) is slow with few rows: 1, 8 and 640 through the 24 layers of the 1.3B model take
    # 161, 181 and 2,349 ms. FBGEMM, which adds by VNNI in 32 bits, takes 85, 138 and 3,329. Sapphire Rapids, two cores.
    ("int8", (torch.int8,), "amx avx512 vnni fbgemm", "fbgemm"),
    # x86 without VNNI adds products in pairs in 16 bits, where products of 8 by 8 bits overflow. One row through the 24
    # layers of the 1.3B model: 65 ms with FBGEMM, 231 with oneDNN. AMD EPYC (Zen 2), two cores.
    ("int8", (torch.int8,), "vnni", "onednn"),
    ("int8", (torch.int8,), "x86 fbgemm", "fbgemm-7-bit"),
    ("int8", (torch.int8,), "x86", "onednn-7-bit"),
    ("int8", (torch.int8,), "", "onednn"),
)
"""Rows of operations, dtypes, the features that a processor must have, and the kernel; the first row that fits counts.
Where no row fits, the kernel is `plain`."""


@functools.cache
def features() -> frozenset[str]:
    """The features of this processor that the choice of kernels depends on; read once.

    They are `x86` or `arm` (which stands for all others); `amd` or `intel`; `fbgemm`, if PyTorch has it with the
    operators that are used; and if PyTorch has oneDNN, `onednn`, `bf16` and `fp16` (oneDNN supports these dtypes),
    `avx2`, `vnni`, `avx512`, `avx512_bf16`, `amx`, `amx_fp16`.
    """
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    vendor = cpu_info("vendor_id")
    found = {"x86": is_x86, "arm": not is_x86, "amd": "AuthenticAMD" in vendor, "intel": "GenuineIntel" in vendor}
    found["fbgemm"] = (
        "fbgemm" in torch.backends.quantized.supported_engines
        and hasattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32")
        and hasattr(torch, "_make_per_channel_quantized_tensor")
    )
    if torch.backends.mkldnn.is_available():
        # The public `torch.cpu.get_capabilities` would replace these private functions, but PyTorch 2.6 lacks it.
        found |= {
            "onednn": True,
            "bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
            "fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported(),
            "avx2": torch.cpu._is_avx2_supported(),
            # PyTorch knows of AVX-512's alone; AVX2 may have it too, as on Intel's client processors since 2021.
            "vnni": torch.cpu._is_vnni_supported() or "avx_vnni" in cpu_info("flags").split(),
            "avx512": torch.cpu._is_avx512_supported(),
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
            "amx": torch.cpu._is_amx_tile_supported(),
            "amx_fp16": torch.cpu._is_amx_fp16_supported(),
        }
    return frozenset(name for name, is_there in found.items() if is_there)


def cpu_info(name: str) -> str:
    """An entry of Linux's `/proc/cpuinfo`, such as `model name`; on other systems Python's name of the processor."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
    except OSError:  # not Linux
        return platform.processor()


def kernel_for(operation: str, dtype: torch.dtype) -> str:
    """The kernel for an operation of `KERNELS` in a dtype, by `set_kernels`, else the variable, else the table.

    Raises:
        ValueError: if the variable names an unknown operation or kernel.
    """
    variable = os.environ.get("DEEPSEEK_VL_KERNELS", "")
    items = (item.partition("=") for item in variable.split(",") if item.strip())
    asked = _checked({name.strip(): kernel.strip() for name, _, kernel in items})
    return (asked | _set).get(operation) or _from_table(operation, dtype)


def set_kernels(**kernels: str) -> None:
    """Override the table, by operation, as in `set_kernels(linear="plain")`; without arguments, undo all overrides.

    Raises:
        ValueError: for an operation or a kernel that is not in `KERNELS`.
    """
    checked = _checked(kernels)
    _set.clear()
    _set.update(checked)


_set: dict[str, str] = {}


def fastest_dtype() -> torch.dtype:
    """The floating point dtype in which this processor computes a token fastest."""
    return _first_that_holds(DTYPES)


def widened_rows() -> int:
    """The number of rows from which a `widening` product is faster than a narrow one."""
    return _first_that_holds(WIDENED_ROWS)


def _first_that_holds(rows: Sequence[tuple[str, Value]]) -> Value:
    return next(value for needed, value in rows if features().issuperset(needed.split()))


def multiplies_fast(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of a floating point dtype at least as fast as those of float32."""
    return _from_table("linear", dtype) != "widening"


def _from_table(operation: str, dtype: torch.dtype) -> str:
    rows = (
        kernel
        for operations, dtypes, needed, kernel in TABLE
        if operation in operations.split() and dtype in dtypes and features().issuperset(needed.split())
    )
    return next(rows, "plain")


def _checked(kernels: dict[str, str]) -> dict[str, str]:
    for operation, kernel in kernels.items():
        if kernel not in KERNELS.get(operation, ()):
            known = "; ".join(f"{name}: {', '.join(names)}" for name, names in KERNELS.items())
            raise ValueError(f"There is no kernel {operation}={kernel}. There are {known}.")
    return kernels
