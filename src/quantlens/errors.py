"""The errors a person can cause. Each message names the thing that was wrong and what to do about it.

The command line prints the message alone (no traceback, unless :func:`debugging`) and exits with code 2.
"""

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches


def debugging() -> bool:
    """Whether a person wants tracebacks with the messages: the environment variable QUANTLENS_DEBUG is set, not 0."""
    return os.environ.get("QUANTLENS_DEBUG", "0") not in ("", "0")


def first_line(error: BaseException) -> str:
    """What another package's error says: its first line that is not a place in that package's source, shortened,
    without the colours of a terminal; its type's name where it says nothing."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
    telling = [line for line in lines if not re.search(r"(Exception from|failed at) \S+:\d+:$", line)]
    return (telling or lines or [type(error).__name__])[0][:300]


class QuantlensError(Exception):
    """Something the caller can put right: a bad name, file, option or image. Base of all quantlens errors.

    A word longer than any name of a file (a file's content in place of its name) is shortened."""

    def __str__(self) -> str:
        return re.sub(r"\S{400,}", lambda found: f"{found[0][:80]}…{found[0][-20:]}", super().__str__())


class UnknownNameError(QuantlensError):
    """A model, method, source, score or option of that name does not exist."""

    def __init__(self, what: str, name: str, known: Iterable[str], hint: str = ""):
        choices = sorted(known)
        close = get_close_matches(str(name), choices, n=3, cutoff=0.5)
        text = f"unknown {what} {name!r}"
        if close:
            text += f"; did you mean {' or '.join(repr(c) for c in close)}?"
        elif choices:
            text += f"; choose one of {', '.join(choices)}" if len(choices) <= 30 else ""
        if hint:
            text += f" ({hint})" if not text.endswith("?") else f" {hint[0].upper()}{hint[1:]}."
        super().__init__(text)
        self.name = name


class QuantlensWarning(UserWarning):
    """Something that a person should know of. The command line prints it in one line."""


class BadImageError(QuantlensError):
    """An image file cannot be read."""


class BadWeightsError(QuantlensError):
    """A checkpoint does not fit the model, cannot be read safely, or holds values that are not finite."""


class CaptureError(QuantlensError):
    """A model cannot be captured as a graph."""


class UnsupportedError(QuantlensError):
    """A combination that a method, format or runtime cannot do."""


class StorageError(QuantlensError):
    """A file or store cannot be written or read (full disk, no permission, damaged content)."""
