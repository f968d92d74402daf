"""What a metric was measured with: versions, processor, threads."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from quantlens import __version__
from quantlens.export.exported import processor


def environment(device: Any = "cpu") -> dict[str, Any]:
    """{"quantlens","torch","timm","python","platform","cpu","device","threads"}; `device` as torch names it. None for a
    package that is not there."""
    return {
        "quantlens": __version__,
        "torch": _version("torch"),
        "timm": _version("timm"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": f"{processor('model name') or platform.processor() or platform.machine()} ({cores()} cores)",
        "device": device_name(device),
        "threads": _threads(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _threads() -> int:
    """Those that torch uses, or could."""
    try:
        import torch
    except ImportError:
        return cores()
    return torch.get_num_threads()


def cores() -> int:
    """Logical processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: Any) -> str:
    """`cpu`, or the accelerator's name after its torch name: `cuda:0 (NVIDIA …)`."""
    if str(device) == "cpu":
        return "cpu"
    import torch

    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def choose_device(name: str | None) -> str:
    """ "auto" (or None) is CUDA where there is one, else the CPU; another name is checked."""
    import torch

    from quantlens.ambient import check_device

    if name in (None, "auto"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return str(torch.device(name))
