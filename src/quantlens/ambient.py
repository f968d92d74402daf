"""What a process has set for all its code: precision, device, gradients, random state, threads.

None of it reaches what quantlens computes, and quantlens leaves all of it as it was: public calls are
:func:`isolated`. Default dtype and random state belong to the
whole process: its other threads see them change for the time of a call.
"""

import ctypes
import os
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import overrides

from quantlens.arguments import checked
from quantlens.errors import QuantlensError

Given = ParamSpec("Given")
Found = TypeVar("Found")


def isolated(function: Callable[Given, Found]) -> Callable[Given, Found]:
    """Decorator: the function runs inside :func:`isolation`, its arguments :func:`~quantlens.arguments.checked`."""

    @wraps(function)
    def inside(*args: Given.args, **kwargs: Given.kwargs) -> Found:
        with isolation():
            return function(*args, **kwargs)

    return checked(inside)


@contextmanager
def isolation() -> Iterator[None]:
    """Inside, torch is set as in a fresh process; afterwards, also after an error, all is as the caller had it: random
    states (Python, numpy, torch), number of threads, default dtype and device, autocast, gradients and inference mode,
    warning filters."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with ExitStack() as stack:
        stack.callback(_set_back, torch.get_num_threads(), list(warnings.filters))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.enter_context(torch.random.fork_rng(devices=devices))
        for part in (short_waits(), torch.inference_mode(False), torch.enable_grad(), plain_arithmetic()):
            stack.enter_context(part)
        yield


def _set_back(threads: int, filters: list[Any]) -> None:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if warnings.filters != filters:  # some libraries add to them when they are imported
        warnings.filters[:] = filters  # type: ignore[index]


def check_device(device: Any) -> None:
    """Raises QuantlensError for a device that torch does not know or cannot use here ("meta" holds no values)."""
    try:
        torch.empty(0, device=device).numpy(force=True)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        known = "write cpu, cuda, cuda:1, mps or auto"
        raise QuantlensError(f"unknown device {device!r}, or none that torch can use here; {known}") from error


@contextmanager
def _without_function_modes() -> Iterator[None]:
    """Inside, no function mode is in force; a default device is one. (To set another inside of it is not enough: in the
    oldest versions of torch that we take, the outer one wins.)"""
    taken = [overrides._pop_mode() for _ in range(overrides._len_torch_function_stack())]
    try:
        yield
    finally:
        for mode in reversed(taken):
            overrides._push_mode(mode)


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Inside, values have the precision and the device that the code says: no autocast; float32 and the CPU where
    nothing is said; float32 products without reduced precision."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.empty(0).device.type != "cpu":  # get_default_device() does not see every one in torch 2.6
            stack.enter_context(_without_function_modes())
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        with suppress(RuntimeError):  # newer settings, by backend, are in use
            precision = torch.get_float32_matmul_precision()
            if precision != "highest":
                stack.callback(torch.set_float32_matmul_precision, precision)
                torch.set_float32_matmul_precision("highest")
        yield


# ---- threads that wait -----------------------------------------------------------------------------------------------


@contextmanager
def short_waits() -> Iterator[None]:
    """Inside, threads of torch that wait for each other sleep soon.

    GNU's OpenMP runtime lets them spin for milliseconds at the end of every operation, and so take the processor from
    whoever has work, the thread they wait for included: many times slower on a machine that does other things, too.
    OMP_WAIT_POLICY=PASSIVE forbids it, but is read when torch is loaded. From then on, one thing makes the runtime stop
    after a 300th of that time: more threads than processors. So some are made, which sleep and compute nothing.
    """
    runtime = None if torch.get_num_threads() == 1 or "OMP_WAIT_POLICY" in os.environ else _gnu_openmp()
    if runtime is None or not _CROWD.acquire(blocking=False):  # or they are there already
        yield
        return
    count = 1 + max(1, len(os.sched_getaffinity(0)) - torch.get_num_threads())
    there, over = threading.Event(), threading.Event()

    def stay() -> None:
        """A team of the runtime stays with the thread that made it."""
        runtime.GOMP_parallel(runtime.omp_get_thread_num, None, count, 0)
        there.set()
        over.wait()

    threading.Thread(target=stay, daemon=True).start()
    there.wait()
    try:
        yield
    finally:
        over.set()
        _CROWD.release()


_CROWD = threading.Lock()
"""Held by whoever has made the idle threads."""


@cache
def _gnu_openmp() -> ctypes.CDLL | None:
    """GNU's OpenMP runtime as torch has loaded it, or None."""
    library = ctypes.CDLL(torch._C.__file__)  # where a name is looked up in what it is linked with, too
    wanted, others = ("GOMP_parallel", "omp_get_thread_num"), ("kmp_set_blocktime",)
    has_all = hasattr(os, "sched_getaffinity") and all(hasattr(library, name) for name in wanted)
    return library if has_all and not any(hasattr(library, name) for name in others) else None
