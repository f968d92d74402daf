"""One file per published method, found by name in one registry."""

from quantlens.calibration import Calibration
from quantlens.methods.base import EVERYTHING, MATMUL_OPERANDS, Departure, Method, MethodInfo, Option, Progress
from quantlens.methods.registry import available, get, place, register

__all__ = [
    "EVERYTHING",
    "MATMUL_OPERANDS",
    "Calibration",
    "Departure",
    "Method",
    "MethodInfo",
    "Option",
    "Progress",
    "available",
    "get",
    "place",
    "register",
]
