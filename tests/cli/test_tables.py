"""Results as a terminal shows them."""

from __future__ import annotations

from rich.console import Console
from study_fakes import FakeModel, quantized

from quantlens.cli._tables import result_tables
from quantlens.evaluation import evaluate

OOD = {"letters": "embedded:letters", "near": "embedded:digits-held-out"}


def text_of(parts) -> str:
    console = Console(width=100, no_color=True, color_system=None, force_terminal=False)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return capture.get()


def test_a_result_as_tables() -> None:
    text = text_of(result_tables(evaluate(quantized(FakeModel(), "W3A3", 13), "embedded:digits-test", OOD)))
    for part in ("fake minmax W3A3, seed 13", "top-1 %", "letters", "mean near", "chance", "left out: "):
        assert part in text
