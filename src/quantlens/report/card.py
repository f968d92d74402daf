"""The model card of a quantized checkpoint: README.md with the metadata that the Hugging Face hub reads, and in words
what was quantized, how, and what was measured on which images. What is not known is said or left out."""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from scipy.stats import binomtest

from quantlens._version import __version__
from quantlens.arguments import checked
from quantlens.data.shared import without_content
from quantlens.errors import QuantlensError, QuantlensWarning, StorageError
from quantlens.evaluation import Result
from quantlens.evaluation.compare import Wanted, replicate
from quantlens.evaluation.environment import environment
from quantlens.evaluation.outputs import Outputs
from quantlens.evaluation.result import plain
from quantlens.files import write_whole
from quantlens.methods import registry
from quantlens.methods.base import EVERYTHING, MATMUL_OPERANDS
from quantlens.metrics import METRICS, score_label
from quantlens.metrics.bootstrap import Resamples, interval
from quantlens.qmodel import QuantizedModel
from quantlens.qmodel.checkpoint import load
from quantlens.qmodel.hub import LIBRARY, find_checkpoint
from quantlens.studies.compare import open_side
from quantlens.studies.reproduce import quantize_command, reproduce_command

README = "README.md"
QUANTIZES = {
    MATMUL_OPERANDS: "partially: the operands of matrix products; residual sums, LayerNorm and softmax stay in float",
    EVERYTHING: "fully: residual sums, LayerNorm and softmax, too",
}
HUB_METRICS = {"top1": "accuracy", "auroc": "roc_auc", "aupr_out": "average_precision"}
"""What the hub calls a metric; others have their own names."""
TASKS = {
    "features": "image-feature-extraction",
    "zero-shot": "zero-shot-image-classification",
    "detect": "object-detection",
}
"""The hub's names of tasks; others are kinds of image classification."""


@checked
def card(
    model: QuantizedModel | str | Path,
    result: Any = None,
    *,
    out: str | Path | None = None,
    repo: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """The model card of a quantized model, as Markdown.

    model: a quantized model, or its checkpoint, beside which the card is then written as README.md. result: what
    :func:`quantlens.evaluate` measured of it (a Result, its dictionary, or a file of ``evaluate --json``); with
    ``keep="scores"`` all its metrics have intervals. By default the one that lies beside the checkpoint. out: a folder
    to write to, the result beside the card as a file. repo: the hub's repository that the card loads from. base_model:
    the hub's name of the float model, and license: by default those of timm's pretrained weights, if these were used.

    Raises QuantlensError for a result of another model, StorageError where a README.md is in the way that is no card
    of this checkpoint.
    """
    file = None if isinstance(model, QuantizedModel) else find_checkpoint(model) or Path(model)
    qmodel = model if isinstance(model, QuantizedModel) else load(model)
    kept = f"{file.stem if file else default_stem(qmodel)}.result.json"
    told = _result_of(qmodel, result) if result is not None else _beside(qmodel, file, kept)
    made = _Card(qmodel, told, file, repo, kept)
    text = made.text(base_model, license)
    folder = Path(out) if out is not None else file.parent if file is not None else None
    if folder is not None:
        check_place(folder, file.name if file else None)
        if made.told is not None:
            write_whole(folder / kept, json.dumps(made.told, indent=1, allow_nan=False) + "\n", what="the result")
        write_whole(folder / README, text, what="the card")
    return text


def default_stem(qmodel: QuantizedModel) -> str:
    """ "digits-vit-w4a4": how a checkpoint is called where nobody says."""
    name = re.sub(r"[^\w.-]+", "-", qmodel.name.removeprefix("hf:")).strip("-.") or "model"
    return f"{name}-{qmodel.bits.lower()}"


def check_place(folder: Path, file: str | None) -> None:
    """Find out whether a card may be written to a folder. Raises StorageError where its README.md is somebody's own, or
    the card of another checkpoint that is still there."""
    there = folder / README
    if not there.exists():
        return
    try:
        head = there.read_text(encoding="utf-8", errors="replace").split("---\n")
        data = yaml.safe_load(head[1]) if len(head) > 2 and not head[0].strip() else None
    except (OSError, yaml.YAMLError):
        data = None
    if not isinstance(data, dict) or data.get("library_name") != LIBRARY:
        raise StorageError(f"{there} is no card of quantlens and is kept; save the checkpoint in another folder")
    other = data.get("checkpoint")
    if file is not None and other not in (None, file) and (folder / str(other)).exists():
        raise StorageError(f"{there} is the card of {other}; save the checkpoint in a folder of its own")


def _beside(qmodel: QuantizedModel, file: Path | None, kept: str) -> dict[str, Any] | None:
    """The result beside a checkpoint, or None; one of another model is left out with a warning."""
    if file is None or not (file.parent / kept).is_file():
        return None
    try:
        return _result_of(qmodel, file.parent / kept)
    except QuantlensError as error:
        warnings.warn(f"the card is without {file.parent / kept}: {error}", QuantlensWarning, stacklevel=4)
        return None


def _result_of(qmodel: QuantizedModel, result: Any) -> dict[str, Any]:
    """A result as a dictionary. Raises QuantlensError where it is of another model."""
    if isinstance(result, str | Path):
        entries = open_side(result).entries
        result = entries[0].result if len(entries) == 1 else None
    if not isinstance(result, Result | Mapping):
        raise QuantlensError("a card takes a result of quantlens.evaluate, or a file of `quantlens evaluate --json`")
    told = (result if isinstance(result, Result) else Result.from_dict(result)).to_dict()
    for key in ("model", "checkpoint_sha256", "method", "bits", "seed", "options", "calibration"):
        own = plain(getattr(qmodel, "name" if key == "model" else key))
        own = without_content(own) if key == "calibration" else own
        if told.get(key) != own:
            raise QuantlensError(f"the result is of another model: its {key} is {told.get(key)}, the model's {own}")
    outputs = getattr(result, "outputs", None)
    return told if outputs is None else told | {"intervals": _intervals(outputs)}


def _intervals(outputs: Outputs) -> dict[str, list[float]]:
    """Path in a result -> the 95 % interval of a metric, by the bootstrap of the images."""
    drawn = replicate(outputs, Wanted(list(outputs.ood_scores), list(outputs.id_scores)), Resamples(2000))
    return {path: list(interval(values)[:2]) for path, values in drawn.items()}


class _Card:
    """What a card says. told: the result; file: the checkpoint; None where there is none. kept: the file of the
    result."""

    def __init__(self, qmodel: QuantizedModel, told: Any, file: Path | None, repo: str | None, kept: str):
        self.qmodel, self.told, self.file, self.repo, self.kept = qmodel, told, file, repo, kept
        self.about = qmodel.provenance
        self.task = TASKS.get(getattr(self.about, "task", ""), "image-classification")
        self.name = file.name if file else f"{default_stem(qmodel)}.safetensors"
        self.intervals = (told or {}).get("intervals") or {}

    def text(self, base_model: str | None, license: str | None) -> str:
        base, terms = _base_of(self.about)
        base, told = base_model or base, self.told
        metadata = self._metadata(base, license or terms)
        return (
            _environment()
            .get_template("card.md.j2")
            .render(
                metadata=Markup(yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000)),
                title=f"{self.about.model} {self.about.bits}",
                model=self.about.model,
                bits=self.about.bits,
                method=self.about.method,
                version=__version__,
                facts=self._facts(base),
                load=f'import quantlens as ql\nqmodel = ql.load("{f"hf:{self.repo}" if self.repo else self.name}")\n'
                "outputs = qmodel(images)  # as the float model gives them",
                shape=", ".join(map(str, self.qmodel.preprocess.input_size)),
                plain_file=code(self.name).strip("`"),
                images=_images(told["id"]) if told else None,
                intervals=self._how_sure(),
                metrics=self._metrics(),
                ood_note="chance is what a score without knowledge reaches",
                ood=self._ood(),
                rewrites=self.qmodel.plan.rewrites,
                again=self._again(),
                versions=self._versions(),
            )
        )

    # -- metadata -----------------------------------------------------------------------------------------------------
    def _metadata(self, base: str | None, license: str | None) -> dict[str, Any]:
        tags = [LIBRARY, "quantization", "post-training-quantization", self.about.method, self.about.bits.lower()]
        data: dict[str, Any] = {
            "library_name": LIBRARY,
            "pipeline_tag": self.task,
            "tags": tags,
            "checkpoint": self.name,
        }
        if license:
            data["license"] = license
        if base:
            data |= {"base_model": base, "base_model_relation": "quantized"}
        if self.told is not None:
            results = [_measured(self.task, self.told["id"], "In distribution", _numbers(self.told["id"]))]
            for entry in (self.told.get("ood") or {}).values():
                score = next((s for s in self.told["histograms"] if s in entry), None)
                if score is not None:
                    found = _numbers(entry[score], score)
                    results.append(_measured(self.task, entry, "Out-of-distribution detection", found))
            data["model-index"] = [{"name": Path(self.name).stem, "results": results}]
        return data

    # -- facts --------------------------------------------------------------------------------------------------------
    def _facts(self, base: str | None) -> list[tuple[str, Any]]:
        about, q = self.about, self.qmodel
        named = f"{code(about.model)}, weights {code(about.checkpoint or 'unknown')}"
        digest = f", SHA-256 {code(about.checkpoint_sha256)}" if about.checkpoint_sha256 else ""
        info = registry.available().get(about.method)
        facts: list[tuple[str, Any]] = [("base model", Markup(named + digest))]
        if base:
            facts.append(("on the hub", code(base)))
        facts.append(("method", code(about.method)))
        if info is not None:
            facts += [("citation", f"{info.citation}{f', {info.url}' if info.url else ''}")]
            facts += [("quantizes", QUANTIZES.get(info.quantizes, info.quantizes))]
        widths = Markup(", by module: {}").format(code(json.dumps(about.widths))) if about.widths else ""
        facts.append(("bits", code(about.bits) + widths))
        facts.append(("options", code(json.dumps(dict(about.options), default=str)) if about.options else "none"))
        facts.append(("seed", about.seed))
        used = about.calibration or {}
        where = Markup("{} images of {}").format(used.get("n"), code(used.get("source") or "memory"))
        facts.append(("calibration", where if used else "none"))
        facts.append(("size of weights and scales", f"{q.size_mb:.2f} MB, {q.size_ratio:.3f} of FP32"))
        if self.file is not None:
            facts.append(("size of the file", f"{self.file.stat().st_size / 1e6:.2f} MB"))
        facts.append(("parameters", f"{q.num_parameters / 1e6:.2f} million"))
        kinds = {"features": "features", "zero-shot": "features", "binary": "logit, yes or no", "multilabel": "labels"}
        kinds["detect"] = "classes, and boxes"
        facts.append(("outputs", f"{q.num_classes} {kinds.get(about.task, 'classes')}"))
        facts.append(("preprocessing", code(json.dumps(plain(q.preprocess.to_dict())))))
        return facts

    # -- what was measured --------------------------------------------------------------------------------------------
    def _how_sure(self) -> str:
        drawn, none = "those of 2000 bootstrap resamples of the images", "as the outputs of single images were not kept"
        if "top1" not in (self.told or {}).get("id", {}):
            return f"95 % intervals are {drawn}" if self.intervals else f"and without intervals, {none}"
        said = "95 % intervals are Wilson's for top-1 and top-5"
        return f"{said}, and {drawn} elsewhere" if self.intervals else f"{said}; the rest has none, {none}"

    def _value(self, path: str, value: Any) -> str:
        """A metric with its interval, where it has one."""
        part, name = path.split(".")[0], path.rpartition(".")[2]
        metric, bounds = METRICS[name], None if part == "fp32" else self.intervals.get(path)
        if name in ("top1", "top5") and value is not None:
            n = int(self.told["id"]["n"])
            bounds = binomtest(round(value * n), n).proportion_ci(method="wilson")
        between = f" ({metric.text(bounds[0])} to {metric.text(bounds[1])})" if bounds and value is not None else ""
        return metric.text(value) + between

    def _metrics(self) -> list[list[str]]:
        """Rows, the head first; none where nothing was measured."""
        if self.told is None:
            return []
        fp32 = (self.told.get("fp32") or {}).get("id") or {}
        change = (self.told.get("change") or {}).get("id") or {}
        rows = [["metric", "quantized", "FP32", "quantized − FP32"]]
        for name, value in self.told["id"].items():
            if name in METRICS:
                m = METRICS[name]
                before = self._value(f"fp32.{name}", fp32.get(name)) if fp32 else "not measured"
                rows.append([m.heading, self._value(f"id.{name}", value), before, m.text(change.get(name), "+")])
        return rows

    def _ood(self) -> list[list[str]]:
        told = self.told or {}
        rows = []
        for name, entry in (told.get("ood") or {}).items():
            for score in (s for s in told["histograms"] if s in entry):
                found, path = entry[score], f"ood.{name}.{score}"
                before = told.get("fp32") or {}
                fp32 = before.get("ood", {}).get(name, {}).get(score, {}).get("aupr_out")
                first = [_images(entry, name), score_label(score)]
                values = [self._value(f"{path}.{m}", found.get(m)) for m in ("aupr_out", "auroc", "fpr95_id")]
                aupr = METRICS["aupr_out"]
                rows.append([*first, *values, aupr.text(fp32), aupr.text(found.get("chance_aupr_out"))])
        heads = [METRICS[name].heading for name in ("aupr_out", "auroc", "fpr95_id")]
        return [["images", "score", *heads, "FP32 AUPR-out %", "chance"], *rows] if rows else []

    # -- how to make it again -----------------------------------------------------------------------------------------
    def _again(self) -> list[tuple[str, str]]:
        found = []
        try:
            found.append(
                ("The checkpoint:", quantize_command(self.about, self.name, self.qmodel.preprocess.input_size))
            )
        except QuantlensError as error:
            found.append((f"No command makes the checkpoint again: {error}.", ""))
        if self.told is not None:
            try:
                command = reproduce_command(self.told, self.kept, self.about.checkpoint)
                found.append(("The metrics, measured again and compared with those above:", command))
            except QuantlensError as error:
                found.append((f"No command measures the metrics again: {error}.", ""))
        return found

    def _versions(self) -> str:
        used = (self.told or {}).get("environment") or environment(self.qmodel.device)
        return ", ".join(f"{name} {value}" for name, value in used.items()) + "."


def _base_of(about: Any) -> tuple[str | None, str | None]:
    """(the hub's name of the float model, its license), as far as they are sure; None where they are not."""
    if about.checkpoint != "pretrained":
        return None, None
    for prefix in ("hf:", "hf-hub:", "hf_hub:"):
        if about.model.startswith(prefix):
            return about.model.removeprefix(prefix).partition("@")[0], None
    import timm

    config = timm.get_pretrained_cfg(about.model.split("/")[-1], allow_unregistered=True)
    return (config.hf_hub_id, config.license) if config is not None and config.hf_hub_id else (None, None)


def _measured(kind: str, part: Mapping[str, Any], task: str, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """An entry of the hub's model-index."""
    source = str(part.get("source") or "images")
    dataset = {"name": f"{source}, {part['n']} images", "type": source.partition(":")[0] or "images"}
    return {"task": {"type": kind, "name": task}, "dataset": dataset, "metrics": metrics}


def _numbers(entry: Mapping[str, Any], score: str = "") -> list[dict[str, Any]]:
    by = f" by {score}" if score else ""
    return [
        {"type": HUB_METRICS.get(name, name), "value": value, "name": METRICS[name].title + by}
        for name, value in entry.items()
        if name in METRICS and METRICS[name].direction and value is not None
    ]


def _images(part: Mapping[str, Any], name: str = "") -> Markup:
    """ "400 images of `imagenet:val`"."""
    skipped = Markup(", {} that cannot be read left out").format(part["skipped"]) if part.get("skipped") else ""
    of = Markup("{}: ").format(escaped(name)) if name else ""
    return Markup("{}{} images of {}{}").format(of, part["n"], code(part.get("source") or "memory"), skipped)


# ---- Markdown --------------------------------------------------------------------------------------------------------


def escaped(value: Any) -> Markup:
    """A text on one line as Markdown shows it literally; Markup as it is."""
    if isinstance(value, Markup):
        return value
    return Markup(re.sub(r"([\\`*_{}\[\]<>#|~!&$])", r"\\\1", " ".join(str(value).split())))


def code(value: Any) -> Markup:
    """A text as a code span, also in a table."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    space = " " if text[:1] == "`" or text[-1:] == "`" or not text else ""
    return Markup(f"{fence}{space}{text}{space}{fence}")


def block(language: str, text: str) -> Markup:
    """A text as a block of code."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return Markup(f"{fence}{language}\n{text}\n{fence}")


def table(rows: list[list[Any]]) -> Markup:
    """Rows as a table, the head first; the first column is text, the others are numbers."""
    lines = [" | ".join(map(escaped, row)) for row in rows]
    lines.insert(1, " | ".join(["---", *["---:"] * (len(rows[0]) - 1)]))
    return Markup("\n".join(f"| {line} |" for line in lines))


def _environment() -> Environment:
    folder = FileSystemLoader(Path(__file__).parent / "templates")
    made = Environment(
        loader=folder,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=escaped,
        autoescape=False,
    )
    made.globals |= {"code": code, "block": block, "table": table}
    return made
