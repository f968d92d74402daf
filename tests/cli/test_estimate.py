"""What is said of the time that is left where there is no terminal."""

from __future__ import annotations

import pytest

from quantlens.cli import _common


def test_a_stage_of_minutes_says_how_long_it_will_take(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(_common.time, "monotonic", lambda: now)
    with _common.stages() as step:
        for done in range(1, 1201):  # two a second: ten minutes
            now = done / 2
            step("evaluating the ID set", done, 1200)
        for done in range(1, 101):  # ten a second, and again: too short to speak of
            now += 0.1
            step("evaluating the ID set", done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "evaluating the ID set: 21 of 1200, about 10 min left",
        "evaluating the ID set: 621 of 1200, about 5 min left",
    ]
    with _common.stages(quiet=True) as step:
        step("x", 1, 1000)
        now += 100
        step("x", 2, 1000)
    assert capsys.readouterr().err == ""
