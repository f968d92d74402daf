"""`quantlens inspect` on the shipped model."""

from __future__ import annotations

import json
import re

IMAGES = ("--n", "8")


def test_help_has_examples(run) -> None:
    code, out, err = run("inspect", "--help")
    assert (code, err) == (0, "")
    assert "    quantlens inspect" in out


def test_ranked_tables_figures_and_page(run, tmp_path) -> None:
    figures, page = tmp_path / "found.json", tmp_path / "found.html"
    code, out, err = run(
        "inspect", "digits-vit", *IMAGES, "--bits", "W4A4", "--top", "4", "--json", str(figures), "--html", str(page)
    )
    assert (code, err) == (0, "")
    data = json.loads(figures.read_text())
    assert data["images"]["source"].startswith("embedded:digits-calibration")
    assert data["images"]["n"] == 8
    order = sorted(data["sites"], key=lambda site: site["effect"]["sqnr_db"])
    shown = [line.split()[0] for line in out.splitlines() if re.match(r"(blocks|patch_embed|head)\b", line)]
    assert shown[:4] == [site["name"] for site in order[:4]]
    assert len(shown) == 4 + 4
    assert f"4 of {len(data['sites'])}" in out
    assert f"{order[0]['effect']['sqnr_db']:.1f}" in out

    text = page.read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"src=|href=\"[^d]", text)
    assert text.count('<div class="chart effects"') == 1
    assert all(text.count(f'<td class="text">{site["name"]}</td>') == 1 for site in data["sites"])
    assert text.index(f">{order[0]['name']}<") < text.index(f">{order[-1]['name']}<")


def test_all_rows_of_another_method_by_kl(run) -> None:
    code, out, err = run(
        "inspect", "digits-vit", *IMAGES, "--bits", "W32A4", "--method", "percentile", "--by", "block", "--rank", "kl",
        "--all", "--option", "p=0.999", "--images", "embedded:digits-test",
    )  # fmt: skip
    assert (code, err) == (0, "")
    kl = [float(line.split()[3]) for line in out.splitlines() if line.startswith("blocks.")]
    assert len(kl) == 6
    assert kl == sorted(kl, reverse=True)
    assert "all 6" in out


def test_mistakes_end_in_one_line(run) -> None:
    for arguments, words in (
        (("digits-vit", "--bits", "FP32"), "quantizes nothing"),
        (("digits-vit", "--by", "layer"), "unknown granularity 'layer'"),
        (("digits-vit", "--rank", "mse"), "unknown rank 'mse'"),
        (("deit_tiny_patch16_224", "--weights", "random"), "give --images SOURCE"),
        (("q.safetensors",), "--weights"),
        (("digits-vit", "--bits", "8"), "not understood"),
    ):
        code, _, err = run("inspect", *arguments, "--n", "1")
        assert code == 2, arguments
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
        assert words in err, err
