"""What a process has set for all its code: precision, device, gradients, random state, threads.

None of it reaches what quantlens computes, and quantlens leaves all of it as it was: public calls are
:func:`isolated`. Default dtype and random state belong to the
whole process: its other threads see them change for the time of a call.
"""

from __future__ import annotations

import ctypes
import os
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, wraps
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Found = TypeVar("Found")


def isolated(function: Callable[Given, Found]) -> Callable[Given, Found]:
    """Decorator: the function runs inside :func:`isolation`."""

    @wraps(function)
    def inside(*args: Given.args, **kwargs: Given.kwargs) -> Found:
        with isolation():
            return function(*args, **kwargs)

    return inside


@contextmanager
def isolation() -> Iterator[None]:
    """Inside, torch is set as in a fresh process; afterwards, also after an error, all is as the caller had it: random
    states (Python, numpy, torch), number of threads, default dtype and device, autocast, gradients and inference mode,
    warning filters."""
    import torch

    threads, filters = torch.get_num_threads(), list(warnings.filters)
    with ExitStack() as stack:
        for part in (_random_state(), short_waits(), torch.inference_mode(False), torch.enable_grad()):
            stack.enter_context(part)
        stack.enter_context(plain_arithmetic())
        try:
            yield
        finally:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            if warnings.filters != filters:  # some libraries add to them when they are imported
                warnings.filters[:] = filters  # type: ignore[index]


@contextmanager
def _without_function_modes() -> Iterator[None]:
    """Inside, no function mode is in force; a default device is one. (To set another inside of it is not enough: in the
    oldest versions of torch that we take, the outer one wins.)"""
    from torch import overrides

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
    import torch

    with ExitStack() as stack:
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.empty(0).device.type != "cpu":  # get_default_device() does not see every one in torch 2.6
            stack.enter_context(_without_function_modes())
        dtype = torch.get_default_dtype()
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        with suppress(RuntimeError):  # newer settings, by backend, are in use
            precision = torch.get_float32_matmul_precision()
            if precision != "highest":
                stack.callback(torch.set_float32_matmul_precision, precision)
                torch.set_float32_matmul_precision("highest")
        yield


@contextmanager
def _random_state() -> Iterator[None]:
    """Afterwards, the generators that all code shares are as before."""
    import numpy as np
    import torch

    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


# ---- threads that wait -----------------------------------------------------------------------------------------------


@contextmanager
def short_waits() -> Iterator[None]:
    """Inside, threads of torch that wait for each other sleep soon.

    GNU's OpenMP runtime lets them spin for milliseconds at the end of every operation, and so take the processor from
    whoever has work, the thread they wait for included: many times slower on a machine that does other things, too.
    OMP_WAIT_POLICY=PASSIVE forbids it, but is read when torch is loaded. From then on, one thing makes the runtime stop
    after a 300th of that time: more threads than processors. So some are made, which sleep and compute nothing.
    """
    import torch

    runtime = None if torch.get_num_threads() == 1 or "OMP_WAIT_POLICY" in os.environ else _gnu_openmp()
    if runtime is None:
        yield
        return
    _CROWD.enter(runtime, 1 + max(1, len(os.sched_getaffinity(0)) - torch.get_num_threads()))
    try:
        yield
    finally:
        _CROWD.leave()


class _Crowd:
    """Idle threads of an OpenMP runtime, which are there as long as somebody is inside."""

    def __init__(self) -> None:
        self._lock, self._inside, self._over = threading.Lock(), 0, threading.Event()

    def enter(self, runtime: ctypes.CDLL, count: int) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._over, there = threading.Event(), threading.Event()
                threading.Thread(target=self._stay, args=(runtime, count, there, self._over), daemon=True).start()
                there.wait()

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._over.set()

    @staticmethod
    def _stay(runtime: ctypes.CDLL, count: int, there: threading.Event, over: threading.Event) -> None:
        """A team of the runtime stays with the thread that made it."""
        try:
            runtime.GOMP_parallel(runtime.omp_get_thread_num, None, count, 0)
        finally:
            there.set()
        over.wait()


_CROWD = _Crowd()


@cache
def _gnu_openmp() -> ctypes.CDLL | None:
    """GNU's OpenMP runtime as torch has loaded it, or None."""
    import torch

    library = ctypes.CDLL(torch._C.__file__)  # where a name is looked up in what it is linked with, too
    wanted, others = ("GOMP_parallel", "omp_get_thread_num"), ("kmp_set_blocktime",)
    has_all = hasattr(os, "sched_getaffinity") and all(hasattr(library, name) for name in wanted)
    return library if has_all and not any(hasattr(library, name) for name in others) else None
