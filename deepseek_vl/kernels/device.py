"""Choosing the device and dtype to compute in, and checking that a device supports quantised weights."""

from pathlib import Path

import psutil
import torch

from deepseek_vl.kernels.policy import fastest_dtype

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux says how much memory a container may use (cgroup version 2)."""

QUANTIZATIONS = ("int8", "int4")
"""The ways to quantise a model's weights when it is loaded, on CPUs and CUDA GPUs."""


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device to run on: the one asked for, or for "auto" the first available of cuda, mps and cpu.

    Raises:
        ValueError: if the device asked for is unknown or not available.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if str(device) == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"Unknown device {str(device)!r}; try auto, cpu, cuda, cuda:1 or mps.") from error
    devices = torch.cuda.device_count() if picked.type == "cuda" else 1
    if not available.get(picked.type, True) or (picked.index or 0) >= devices:
        raise ValueError(f"Device {str(device)!r} is not available on this machine; use --device cpu or auto.")
    return picked


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on a device now: what the system, a container or the driver has left."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    if device.type == "mps":
        return min(free, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    try:  # a container's limit
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # there is none, or it is "max"
        return free
    # Cached files, such as weights that were read, count as used, but are evicted when memory is needed.
    return min(free, max(limit - used + int(statistics["inactive_file"]), 0))


def pick_dtype(device: torch.device, dtype: str | torch.dtype = "auto") -> torch.dtype:
    """The dtype to compute in: the one asked for, or for "auto" the best for the device.

    That is bfloat16, or float16 on GPUs without bfloat16, or `fastest_dtype` on CPUs. A CPU only has to read and
    convert that dtype fast, not to multiply in it (see `WideningLinear`).

    Raises:
        ValueError: for a name that is no floating point dtype.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.float16
        return fastest_dtype() if device.type == "cpu" else torch.bfloat16
    picked = getattr(torch, dtype, None)
    if not isinstance(picked, torch.dtype) or not picked.is_floating_point:
        raise ValueError(f"Unknown dtype {dtype!r}; try auto, bfloat16, float16 or float32.")
    return picked


def check_quantization(device: torch.device, quantize: str | None) -> None:
    """Check that weights can be quantised in this way on this device; None is for weights that are not quantised.

    Raises:
        ValueError: if they cannot, or the way is unknown.
    """
    if quantize is None:
        return
    if quantize not in QUANTIZATIONS:
        raise ValueError(f"Unknown quantize {quantize!r}; try {' or '.join(QUANTIZATIONS)}.")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"Quantised weights ({quantize}) are for cpu and cuda, not for {device.type}.")
    if device.type == "cuda":
        from deepseek_vl.kernels.weight_only import check_torchao

        check_torchao()
    elif not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        raise ValueError(f"This PyTorch has no kernel for quantised weights ({quantize}): it was built without oneDNN.")
    elif quantize == "int4":
        from deepseek_vl.kernels.int4 import check_int4

        check_int4()
