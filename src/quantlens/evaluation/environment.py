"""What a metric was measured with: versions, processor, threads."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any


def environment(device: Any = "cpu") -> dict[str, Any]:
    """{"quantlens","torch","timm","python","platform","cpu","device","threads"}; `device` as torch names it."""
    import torch

    from quantlens import __version__

    return {
        "quantlens": __version__,
        "torch": torch.__version__,
        "timm": version("timm"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """The processor's model name, with the number of logical cores this process may use."""
    name = ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        pass
    return f"{name or platform.processor() or platform.machine()} ({cores()} cores)"


def cores() -> int:
    """Logical processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: Any) -> str:
    """`cpu`, or the accelerator's name after its torch name: `cuda:0 (NVIDIA …)`."""
    import torch

    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def choose_device(name: str | None) -> str:
    """ "auto" (or None) is CUDA where there is one, else the CPU; another name is checked."""
    import torch

    from quantlens.errors import QuantlensError

    if name in (None, "auto"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise QuantlensError(f"unknown device {name!r}; write cpu, cuda, cuda:1, mps or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise QuantlensError(f"device {name!r}: torch sees no CUDA GPU here; use cpu or auto")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise QuantlensError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA GPUs, counted from 0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise QuantlensError(f"device {name!r}: torch sees no Apple GPU here; use cpu or auto")
    return str(device)
