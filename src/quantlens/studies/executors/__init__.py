"""Where the cells of a study run: in this process, in several processes of this machine, or on a Ray cluster."""

from __future__ import annotations

EXECUTORS = ("local", "ray")
"""The names that `run_study` and `--executor` take."""
