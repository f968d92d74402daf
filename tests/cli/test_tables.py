"""Results as a terminal shows them."""

from __future__ import annotations

from rich.console import Console
from study_fakes import FakeModel, quantized

from quantlens.cli.bench import MARK, quality_table
from quantlens.cli.evaluate import tables as result_tables
from quantlens.cli.study import means_table
from quantlens.evaluation.run import evaluate
from quantlens.metrics import Spread
from quantlens.studies.results import Mean

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


def test_shifted_images_as_tables() -> None:
    """Each set where they are few; of many corruptions the means alone."""
    asked = {"v2": "embedded:digits-test[30:50]", "corrupt": ["fog:1,3"]}
    model, sets = quantized(FakeModel(), "W3A3"), {"letters": "embedded:letters[0:20]"}
    found = evaluate(model, "embedded:digits-test[0:30]", sets, shift=asked, scores=["msp"])
    text = text_of(result_tables(found))
    assert "Under shift (Δ: quantized − FP32)" in text
    mean, before = (part["shift_mean"]["corruptions"] for part in (found.to_dict(), found.fp32))
    line = next(line for line in text.splitlines() if line.startswith("│ mean, corruptions"))
    change = 100 * (mean["top1"] - before["top1"])
    assert f"{100 * mean['top1']:.2f}" in line
    assert f"{change:+.2f}" in line
    assert (
        f"mean corruption error: mCE % {100 * mean['mce']:.2f}, mCE of FP32's % {100 * mean['relative_mce']:.2f}"
        in text
    )
    assert "Full-spectrum OOD detection" in text
    assert f"{100 * found.full_spectrum_mean['far']['msp']['auroc']:.2f}" in text
    assert "│ fog:1" in text
    many = evaluate(model, "embedded:digits-test[0:3]", shift={"corrupt": "all:1"}, reference=False)
    text = text_of(result_tables(many))
    assert "mean, severity 1" in text
    assert "│ fog:1" not in text
    assert "Δ" not in text


def test_means_as_a_table() -> None:
    far = "ood_mean.far.msp.aupr_out"
    means = [
        Mean("m", "fp32", "FP32", [0], {"id.top1": Spread(0.75, None, 1), far: Spread(0.5, None, 1), "id.nll": None}),
        Mean("m", "minmax", "W4A4", [0, 1, 2], {"id.top1": Spread(0.5, 0.012, 3), far: None, "id.nll": None}),
        Mean("m", "minmax", "W2A2", [0, 1], {"size_mb": Spread(0.25, 0.0, 2)}),
    ]
    text = text_of([means_table(means, "three rows")])
    for part in ("three rows", "top-1 % ↑", "mean far, msp", "75.00", "50.00 ± 1.20", "size MB ↓", "0.25", "–"):
        assert part in text
    assert "NLL" not in text, "no row has it"
    assert "0.25 ±" not in text, "no seed changes a size"
    assert text.count("minmax") == 1


def test_a_race_as_one_table() -> None:
    """A row for each contender: what it is worth, and its latency at every place."""
    rows = [
        {"label": label, "fingerprint": label, "batch": batch, "threads": 2, "median_ms": ms, "speedup": ratio}
        | {"top1": top1, "nll": 0.5, "aupr_out": None, "sqnr_db": db, "agreement": 0.9, "size_mb": 1.0}
        | {"integers": integers, "front": ms < 5}
        for batch in (1, 8)
        for label, ms, ratio, top1, db, integers in (
            ("float", 8.0 * batch, 1.0, 0.75, 60.0, None),
            ("peer", 4.0 * batch, 2.0, 0.5, 21.25, "saturate"),
        )
    ]
    console = Console(width=160, no_color=True, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(quality_table(rows, "sqnr_db"))
    lines = capture.get().splitlines()
    (first,), (second,) = ([line for line in lines if name in line] for name in ("│ float", "peer: integers saturate"))
    assert [cell.strip() for cell in first.split("│")[2:-1]] == (
        ["75.00", "0.500", "–", "60.0", "90.00", "8.0 1.00×", "64.0 1.00×"]
    )
    assert f"4.0 2.00×{MARK}" in second
    assert f"32.0 2.00×{MARK}" not in second
    assert "ms, 8 on 2" in capture.get()
    assert "Pareto front of SQNR against latency" in " ".join(capture.get().split())
