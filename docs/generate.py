"""What the site has of the code and of docs/results.json, written when it is built (a hook of MkDocs).

A page per method from its MethodInfo, the tables of results, the page on the command line, and the files beside docs/
that pages link to. `python docs/generate.py PAGE` prints a page that is generated.
"""

from __future__ import annotations

import html
import importlib
import inspect
import json
import posixpath
import re
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import finding
import yaml
from docstrings import as_markdown

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
BESIDE = (
    "research/*.md",
    "research/*/*.yaml",
    "examples/*.yaml",
    "benchmarks/README.md",
    "benchmarks/quality/README.md",
)
SINGLE = ("CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE")
METRICS = {"top1": "top-1 %", "nll": "NLL", "kl": "KL", "aupr": "Δ AUPR-out", "size_mb": "MB"}
UNDER_CORRUPTION = {
    "mce": "mean corruption error %",
    "relative_mce": "÷ FP32's",
    "severities": "top-1 at severities 1, 3, 5",
    "nll_corrupted": "NLL, corrupted",
    "ece_corrupted": "ECE %, corrupted",
    "auroc": "AUROC %",
    "auroc_full": "AUROC %, full spectrum",
}
"""Columns of rows that were measured on corrupted images, too: a value with the ends of its interval, or a list."""


def table(head: list[str], rows: list[list[str]]) -> str:
    def in_code(match: re.Match[str]) -> str:
        return f"<code>{html.escape(match[1]).replace('|', '&#124;')}</code>"  # a backslash would be shown there

    def cell(text: str) -> str:
        return re.sub(r"`([^`]*\|[^`]*)`", in_code, text).replace("|", "\\|").replace("\n", " ")

    def line(values: list[str]) -> str:
        return "| " + " | ".join(map(cell, values)) + " |"

    return "\n".join([line(head), "|" + " --- |" * len(head), *map(line, rows)]) + "\n"


# -- results


def results() -> dict[str, Any]:
    return json.loads((DOCS / "results.json").read_text(encoding="utf-8"))


def number(value: Any, sign: bool = False) -> str:
    """A number, or a mean with its standard deviation."""
    if value is None:
        return "–"
    mean, *spread = value if isinstance(value, list) else [value]
    shown = f"{mean:+}" if sign else str(mean)
    return "\u00a0±\u00a0".join([shown.replace("-", "−"), *map(str, spread)])  # never broken between lines


def with_interval(row: dict[str, Any], column: str) -> str:
    """A value (with the ends of its 95 % interval), or several values."""
    value, *ends = [str(one) for one in row.get(column) or ["–"]]
    if column == "severities":
        return ", ".join([value, *ends])
    return value if not ends else f"{value} ({ends[0]} to {ends[1]})"


def unbroken(text: str) -> str:
    """Never broken between lines at its hyphens."""
    return text.replace("-", "\u2011")


def aupr_change(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Of the mean over the OOD sets, quantized less FP32, in points."""
    if "aupr_out_change" in row:
        return number(row["aupr_out_change"], sign=True)
    fp32 = next((r for r in rows if r["model"] == row["model"] and r["method"] is None), {})
    if row["method"] is None or "aupr_out" not in row or "aupr_out" not in fp32:
        return "–"

    def mean(sets: dict[str, Any]) -> float:
        return sum(v[0] if isinstance(v, list) else v for v in sets.values()) / len(sets)

    return number(round(mean(row["aupr_out"]) - mean(fp32["aupr_out"]), 1), sign=True)


def setting(row: dict[str, Any], link: str = "") -> str:
    if row["method"] is None:
        return "FP32"
    name = f"[`{row['method']}`]({link}{row['method']}.md)" if link else f"`{row['method']}`"
    return " ".join([name, *(f"`{key}={str(value).lower()}`" for key, value in row["options"].items())])


def result_table(
    rows: list[dict[str, Any]], every: list[dict[str, Any]], link: str = "", of_one_model: bool = False
) -> str:
    """rows: those shown; every: of the same set, FP32 among them; of_one_model: without a column of its name."""
    sets = next((list(r["aupr_out"]) for r in rows if "aupr_out" in r), [])
    columns = [key for key in METRICS if any(key in r or (key == "aupr" and "aupr_out_change" in r) for r in rows)]
    if sets and "aupr" not in columns:
        columns.append("aupr")
    under = [key for key in UNDER_CORRUPTION if any(key in r for r in rows)]
    head = ["model", "method", "bits", *(METRICS[c] for c in columns)]
    head += [UNDER_CORRUPTION[c] for c in under]
    lines = []
    for row in rows:
        values = [aupr_change(row, every) if c == "aupr" else number(row.get(c)) for c in columns]
        values += [with_interval(row, c) for c in under]
        values += [number(row.get("aupr_out", {}).get(name)) for name in sets]
        first = [unbroken(row["model"]), setting(row, link), row["bits"]]
        lines.append([*first, *values, str(row["seeds"]), unbroken(row["date"])])
    head += [*(f"AUPR-out: {name}" for name in sets), "seeds", "date"]
    return table(head[of_one_model:], [line[of_one_model:] for line in lines])


def results_tables() -> str:
    data, parts = results(), []
    for key, about in data["sets"].items():
        rows = [row for row in data["rows"] if row["set"] == key]
        parts.append(f"## {about['title']}\n\nImages: {about['images']} {about['note']}\n")
        parts.append(f"Study: [{about['study']}](../{about['study']})\n")
        for model in dict.fromkeys(row["model"] for row in rows):
            mine = [row for row in rows if row["model"] == model]
            parts.append(f"**{model}**\n\n" + result_table(mine, rows, "methods/", of_one_model=True))
    return "\n".join(parts)


def calibration_images_table() -> str:
    """A row for each method and precision, a column for each kind and number of calibration images."""
    found, parts = results()["calibration_images"], []
    kinds = list(dict.fromkeys(row["images"] for row in found if row["method"]))
    for model in dict.fromkeys(row["model"] for row in found):
        mine = [row for row in found if row["model"] == model]
        fp32 = next(row["top1"] for row in mine if row["method"] is None)
        lines = {}
        for row in mine:
            if row["method"] is not None:
                lines.setdefault((f"`{row['method']}`", row["bits"]), {})[row["images"]] = row["top1"]
        body = [[*key, *(str(of.get(kind, "–")) for kind in kinds)] for key, of in lines.items()]
        parts.append(f"**{model}** (FP32 {fp32})\n\n" + table(["method", "bits", *map(unbroken, kinds)], body))
    return "\n".join(parts)


def floating_formats_section() -> str:
    """A row for each format and method, of each model; changes of AUPR-out are against FP32's. Nothing without
    results."""
    found = results().get("floating_formats", [])
    if not found:
        return ""
    parts = [
        "## What they cost\n\n300 official validation images, 32 calibration images, one draw; AUPR-out by MSP is the "
        "mean over textures, places and flowers, corrupted images are those with noise, fog and JPEG at severity 3. "
        "Made by `python -m benchmarks.floating_formats`.\n"
    ]
    head = ["format", "method", "top-1 %", "NLL", "ECE %", "Δ AUPR-out", "top-1 %, corrupted", "MB"]
    for model in dict.fromkeys(row["model"] for row in found):
        mine = [row for row in found if row["model"] == model]
        fp32 = next(row for row in mine if row["method"] == "")
        lines = []
        for row in mine:
            change = "–" if row is fp32 else number(round(row["aupr_out"] - fp32["aupr_out"], 1), sign=True)
            values = [str(row["top1"]), str(row["nll"]), str(row["ece"]), change]
            method = f"[`{row['method']}`](methods/{row['method']}.md)" if row["method"] else "–"
            lines.append([row["format"], method, *values, str(row["corrupted"]), str(row["size_mb"])])
        parts.append(f"**{model}**\n\n" + table(head, lines))
    return "\n".join(parts)


def races_section() -> str:
    """A table for each model and processor: quality of every contender, and its latency at each batch size and thread
    count. Nothing without results."""
    found = results().get("races", [])
    if not found:
        return ""
    parts = [
        "## Measured races\n\nOf W8A8 files, 32 calibration images; quality on 300 official validation images against "
        "textures, places and flowers, speed alone where weights are random. SQNR is of the logits against FP32's (60: "
        "equal but for rounding). A latency is the median of a batch in ms, with the ratio to PyTorch eager FP32 in "
        "the same run; ● is on the Pareto front of SQNR against latency. Made by `python -m benchmarks.race`.\n"
    ]
    columns = {"top1": "top-1 %", "nll": "NLL", "aupr_out": "AUPR-out %", "sqnr_db": "SQNR dB", "agreement": "same %"}
    for race in found:
        sums = "with VNNI" if race["vnni"] else "without VNNI"
        versions = ", ".join(f"{name} {version}" for name, version in race["versions"].items())
        own = [key for key in columns if any(key in row for row in race["rows"])]
        places = list(race["rows"][0]["latency"])
        lines = []
        for row in race["rows"]:
            name = row["label"] + (f" (integers {row['integers']})" if row["integers"] else "")
            lines.append([name, *(number(row.get(key)) for key in own), *map(latency, row["latency"].values())])
        parts.append(f"**{race['model']}** on {race['cpu']} {sums}, {unbroken(race['date'])}; {versions}\n")
        head = ["", *(columns[key] for key in own), *(f"ms, batch {p.replace(' on ', ', threads ')}" for p in places)]
        parts.append(table(head, lines))
    return "\n".join(parts)


def latency(place: dict[str, Any]) -> str:
    """ "5.21 (2.77×) ●"; never broken between lines."""
    return f"{place['median_ms']}\u00a0({place['speedup']}×)" + ("\u00a0●" if place.get("front") else "")


def published_table() -> str:
    rows = results()["published"]
    head = [key.replace("deit_tiny_", "DeiT-Tiny ").replace("deit_small_", "DeiT-Small ") for key in rows[0]]
    head = [re.sub(r" w(\d)a(\d)", r" W\1A\2", name) for name in head]
    return table(head, [[v if isinstance(v, str) else number(v) for v in row.values()] for row in rows])


# -- methods


def methods() -> dict[str, Any]:
    """Name -> MethodInfo of the methods that ship with the package."""
    from quantlens.methods import registry

    return {name: info for name, info in registry.available().items() if not registry.place(name)}


def in_words() -> dict[str, dict[str, str]]:
    return yaml.safe_load((DOCS / "methods.yaml").read_text(encoding="utf-8"))


def quantizes(info: dict[str, Any]) -> str:
    return f"{info['quantizes']} quantized"


def methods_table() -> str:
    rows = []
    for name, entry in in_words().items():
        info = methods()[name].to_dict()
        paper = f"{info['venue']} {info['year']}"
        paper = f"[{paper}]({info['url']})" if info["url"].startswith("http") else "ours"
        rows.append(
            [f"[`{name}`](methods/{name}.md)", info["quantizes"], entry["idea"].split(". ")[0].rstrip(".") + ".", paper]
        )
    return table(["method", "quantizes", "the idea", "paper"], rows)


def formats_table() -> str:
    words = in_words()
    return table(
        ["method", "weights", "activations"], [[f"`{n}`", w["weights"], w["activations"]] for n, w in words.items()]
    )


def default(value: Any) -> str:
    return "–" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def method_page(name: str) -> str:
    from quantlens.methods import registry

    info, words = methods()[name].to_dict(), in_words()[name]
    lines = [f"# {name}", f"**{info['title']}.** {words['idea']}", ""]
    if info["url"].startswith("http"):
        lines.append(f"- Paper: [{info['citation']}]({info['url']})")
    else:
        lines.append("- Paper: none; this is quantlens' own method")
    lines += [f"- Quantizes: {info['quantizes']} ([what that means](../methods.md#partially-and-fully-quantized))"]
    lines += [f"- Weights: {words['weights']}", f"- Activations: {words['activations']}", f"- Take it {words['take']}"]
    if info["aliases"]:
        lines.append("- Also found as " + ", ".join(f"`{alias}`" for alias in info["aliases"]))
    if words.get("more"):
        lines.append(f"- More: {words['more']}")
    lines += ["", "```console", f"$ quantlens quantize digits-vit --method {name} --bits W6A6 \\"]
    lines += [f"    --calibration embedded:digits-calibration --out {name}.safetensors", "```", ""]
    lines += ["## How it works", "", inspect.cleandoc(as_markdown(module_doc(registry.get(name)))), ""]
    lines += ["## Options", ""]
    if info["options"]:
        rows = [
            [
                f"`{o['name']}`",
                default(o["default"]),
                ", ".join(default(c) for c in o["choices"] or ()) or o["type"],
                o["help"],
            ]
            for o in info["options"]
        ]
        lines.append(table(["option", "default", "values", "meaning"], rows))
    else:
        lines.append("None of its own.\n")
    lines.append(
        "Every method also takes the [arguments that all share](../methods.md#arguments-that-all-methods-share).\n"
    )
    if info["departures"]:
        lines += ["## Departures from the paper", "", "`--option variant=paper` undoes all of them.", ""]
        rows = [[f"`{d['setting']}`", default(d["ours"]), default(d["paper"]), d["what"]] for d in info["departures"]]
        lines.append(table(["setting", "here", "in the paper", "what"], rows))
    if info["readings"]:
        lines += ["## Where the paper leaves a choice", "", *(f"- {reading}" for reading in info["readings"]), ""]
    lines += beside_the_authors(name)
    lines += ["## Measured", ""]
    data = results()
    for key, about in data["sets"].items():
        every = [row for row in data["rows"] if row["set"] == key]
        own = [row for row in every if row["method"] == name]
        if own:
            shown = [
                row for row in every if row["method"] is None and any(row["model"] == o["model"] for o in own)
            ] + own
            lines += [
                f"**{about['title']}** ([images and study](../results.md#{slug(about['title'])}))",
                "",
                result_table(shown, every),
            ]
    if lines[-1] == "":
        lines.append("No results yet.")
    return "\n".join(lines) + "\n"


def several(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def beside_the_authors(name: str) -> list[str]:
    """Scales of six layers and those of the authors' code, of the methods that docs/fidelity.yaml has."""
    told = yaml.safe_load((DOCS / "fidelity.yaml").read_text(encoding="utf-8")).get(name)
    if told is None:
        return []
    lines = ["## Beside the authors' code", "", told["text"], ""]
    numbers = {why: number for number, why in enumerate(told["reasons"], 1)}
    for case in told["cases"]:
        rows = [
            [
                f"`{row}`",
                " or ".join(f"{one:.4g}" for one in several(ours)),
                f"{theirs:.4g}",
                " or ".join(f"{100 * (one / theirs - 1):+.1f}\u00a0%" for one in several(ours)),
                *map(str, map(numbers.get, why)),
            ]
            for row, (ours, theirs, *why) in case["rows"].items()
        ]
        lines += [
            f"{case['title']}:",
            "",
            table(["scale of", "here", "theirs", "difference", "why"], [[*row, ""][:5] for row in rows]),
        ]
    return [*lines, "Why they differ:", "", *(f"{numbers[why]}. {text}" for why, text in told["reasons"].items()), ""]


def module_doc(method: Any) -> str:
    """The head of the method's file without its title line."""
    text = importlib.import_module(type(method).__module__).__doc__ or ""
    text = re.sub(r"^[\w-]+: ", "", text.strip(), count=1)
    return text if text.startswith("quantlens") else text[:1].upper() + text[1:]


def slug(title: str) -> str:
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower())).strip("-")


# -- the command line


def rich_markup(text: str) -> str:
    return html.escape(re.sub(r"\[/?(?:bold|italic|dim|cyan|green|yellow|red)[^\]]*\]", "", text), quote=False)


def help_as_markdown(text: str) -> str:
    """Paragraphs, then the examples as a block."""
    before, _, after = text.partition("[bold]Examples[/bold]\n")
    paragraphs = [rich_markup(" ".join(part.split())) for part in before.split("\n\n")]
    lines = [line if line.startswith(" ") else f"$ {line}" for line in dedent(after).splitlines() if line.strip()]
    block = ['```console title="Examples"', *lines, "```"] if lines else []
    return "\n\n".join(paragraphs) + "\n\n" + "\n".join(block)


def command_page() -> str:
    import typer

    from quantlens.cli.main import app

    lines = []
    for name, command in typer.main.get_command(app).commands.items():
        lines += [f"## quantlens {name}", "", help_as_markdown(command.help or ""), ""]
        rows = []
        for parameter in command.params:
            if parameter.name == "help":
                continue
            shown = ", ".join(f"`{opt if opt.startswith('-') else opt.upper()}`" for opt in parameter.opts)
            if parameter.metavar and parameter.opts[0].startswith("-"):
                shown = f"{shown[:-1]} {parameter.metavar}`"
            value = parameter.default
            has = value is not None and value is not False
            about = rich_markup(parameter.help or "") + (" **Required.**" if parameter.required else "")
            rows.append([shown, about, f"`{value}`" if has else ""])
        lines.append(table(["", "meaning", "default"], rows))
    return "\n".join(lines)


GENERATED = {
    "methods-table": methods_table,
    "formats-table": formats_table,
    "results-tables": results_tables,
    "calibration-images": calibration_images_table,
    "floating-formats": floating_formats_section,
    "races": races_section,
    "published-table": published_table,
    "commands": command_page,
    "sources-table": lambda: sources_table(),
    "corruptions-table": lambda: corruptions_table(),
    "shared-arguments": lambda: shared_arguments(),
    **finding.marks(table),
}


def shared_arguments() -> str:
    from quantlens.methods.base import SHARED_OPTIONS

    rows = [
        [f"`{name}`", f"`--{name.replace('_', '-')}`", default(o.default), o.help] for name, o in SHARED_OPTIONS.items()
    ]
    return table(["in Python", "on the command line", "default", "meaning"], rows)


def sources_table() -> str:
    from quantlens.data import available_sources

    kinds = available_sources().items()
    return table(["source", "images"], [[f"`{name}:{k.what.upper()}`", k.description] for name, k in kinds])


def corruptions_table() -> str:
    from quantlens.data import CORRUPTIONS

    rows = [[f"`{name}`", found.kind + ", extra" * found.extra, found.what] for name, found in CORRUPTIONS.items()]
    return table(["corruption", "kind", "what it is"], rows)


def filled(markdown: str) -> str:
    """Text whose lines `<!-- generated: NAME -->` are replaced by what they name."""
    return re.sub(r"<!-- generated: ([\w-]+) -->", lambda found: GENERATED[found[1]](), markdown)


# -- MkDocs


def on_config(config: Any) -> Any:
    pages = [{name: f"methods/{name}.md"} for name in in_words()]
    config.nav = [{"Methods": ["methods.md", *pages]} if "Methods" in entry else entry for entry in config.nav]
    if finding.finding() is not None:
        guides = next(entry["Guides"] for entry in config.nav if "Guides" in entry)
        guides.append({"What in training decides": "training-factors.md"})
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for name in in_words():
        files.append(File.generated(config, f"methods/{name}.md", content=method_page(name)))
    for path in [*(p for pattern in BESIDE for p in sorted(ROOT.glob(pattern))), *(ROOT / name for name in SINGLE)]:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links are those of the repository, where docs/ is a folder; on the site its pages are at the top."""
    source = page.file.src_uri
    inside = (DOCS / source).exists() or source.startswith("methods/")
    folder = posixpath.dirname(f"docs/{source}" if inside else source)

    def link(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        if "://" in target or target.startswith(("#", "mailto:")):
            return found[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        path = "index.md" if path == "README.md" else path.removeprefix("docs/")
        path = (
            posixpath.join(path, "README.md") if files.get_file_from_path(posixpath.join(path, "README.md")) else path
        )
        return f"]({posixpath.relpath(path, posixpath.dirname(source) or '.')}{anchor})"

    return re.sub(r"\]\(([^()\s#]+)(#[^()\s]*)?\)", link, filled(markdown))


if __name__ == "__main__":
    wanted = sys.argv[1].removesuffix(".md")
    own = wanted.removeprefix("methods/")
    print(method_page(own) if own in in_words() else filled((DOCS / f"{wanted}.md").read_text(encoding="utf-8")))
