"""Arguments of public calls: one of a wrong kind is refused in one sentence, before anything is done."""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import quantlens as ql
from quantlens.arguments import checked
from quantlens.errors import QuantlensError

LONG = "x" * 5000


def _call(
    text: str = "",
    whole: int | None = None,
    number: float = 0.0,
    names: Sequence[str] | None = None,
    sets: Mapping[str, Any] | None = None,
    told: Callable[[int], None] | None = None,
    path: str | Path = "x",
    anything: Any = None,
    other: str | torch.Tensor = "",
) -> str:
    return "done"


@pytest.mark.parametrize(
    "given",
    [
        {"whole": None},
        {"whole": np.int64(3)},
        {"number": 1},
        {"number": np.float32(0.5)},
        {"number": float("inf")},
        {"names": ["a"]},
        {"names": ("a",)},
        {"names": {"a": 1}.keys()},
        {"names": (name for name in "ab")},
        {"sets": {}},
        {"told": print},
        {"path": Path("a")},
        {"anything": object()},
        {"other": object()},
    ],
)
def test_what_fits(given: dict[str, Any]) -> None:
    assert checked(_call)(**given) == "done"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"text": None}, "text is None; give a text"),
        ({"whole": True}, "whole is True; give a whole number or None"),
        ({"whole": 1.5}, "whole is 1.5"),
        ({"whole": "1"}, "whole is '1'"),
        ({"number": float("nan")}, "number is nan; give a number"),
        ({"number": "1"}, "number is '1'"),
        ({"names": "msp"}, "names is 'msp'; give a list of texts or None"),
        ({"names": [1]}, r"names is \[1\]"),
        ({"names": {"a": 1}}, "names is {'a': 1}"),
        ({"sets": ["a"]}, "give a dictionary whose keys are texts or None"),
        ({"sets": {1: 2}}, "sets is {1: 2}"),
        ({"told": 1}, "told is 1; give a function or None"),
        ({"told": torch.zeros(9)}, "told is a Tensor"),
        ({"path": 1}, "path is 1; give a text or a path"),
        ({"path": LONG}, r"path x{40}… is too long for the name of a file"),
        ({"path": Path("a\0b")}, "is no path: embedded null"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_does_not(given: dict[str, Any], said: str) -> None:
    with pytest.raises(QuantlensError, match=said):
        checked(_call)(**given)
    if len(given) == 1 and "text" in given:
        with pytest.raises(QuantlensError, match=said):
            checked(_call)(*given.values())


FUNCTIONS = ("quantize", "allocate", "inspect", "evaluate", "compare", "load", "save", "load_model", "recommend")
MORE = ("reproduce", "plot", "results", "card", "push_to_hub", "load_plugin")


@pytest.mark.parametrize("name", FUNCTIONS + MORE)
def test_public_functions_are_checked(name: str) -> None:
    """Their annotations are no texts, which are not read."""
    function = getattr(ql, name)
    assert hasattr(function, "__wrapped__")
    assert not any(isinstance(one.annotation, str) for one in signature(function).parameters.values())


IMAGES = torch.zeros(1, 3, 32, 32)

CALLS: list[tuple[Callable[[Any, Any], Any], str]] = [
    (lambda m, q: ql.quantize("digits-vit", IMAGES), "a str was given where a model is wanted"),
    (lambda m, q: ql.quantize(m, IMAGES, method=None), "method is None; give a text"),
    (lambda m, q: ql.quantize(m, IMAGES, method="minmax", seed=True), "seed is True"),
    (lambda m, q: ql.quantize(m, IMAGES.to_sparse(), method="minmax"), "plain tensor"),
    (lambda m, q: ql.quantize(m, {}, method="minmax"), "a dict with nothing"),
    (lambda m, q: ql.allocate(m, IMAGES, sensitivity=[]), "sensitivity is"),
    (lambda m, q: ql.allocate(m, IMAGES, budget=float("inf")), "a budget of inf is none"),
    (lambda m, q: ql.inspect(m, IMAGES, by=None), "by is None; give a text or a list of texts"),
    (lambda m, q: ql.evaluate(q, id="embedded:digits-test[0:2]", scores=1), "scores is 1; give a list"),
    (lambda m, q: ql.evaluate(q, id="embedded:digits-test[0:2]", device=1.5), "device is 1.5"),
    (lambda m, q: ql.evaluate(q, id="embedded:digits-test[0:2]", device="meta"), "unknown device 'meta'"),
    (lambda m, q: ql.evaluate(q, id="embedded:digits-test[0:2]", n_bins=10**12), "a whole number from 1 to 1000000"),
    (lambda m, q: ql.export(torch.nn.Linear(1, 1), "a.onnx"), "Linear is no float or quantized model"),
    (lambda m, q: ql.export(q, LONG + ".onnx"), "too long for the name of a file"),
    (lambda m, q: ql.load(None), "path is None"),
    (lambda m, q: ql.load("absent.safetensors", device="gpu"), "unknown device 'gpu'"),
    (lambda m, q: ql.save(m, "a.safetensors"), "a Model cannot be saved"),
    (lambda m, q: ql.load_model(LONG), "too long for the name of a file"),
    (lambda m, q: ql.load_model("digits-vit", weights=""), "weights is an empty text"),
    (lambda m, q: ql.load_model("digits-vit", preprocess=1), "preprocess is a int"),
    (lambda m, q: ql.load_model("digits-vit", device="gpu"), "unknown device 'gpu'"),
    (lambda m, q: ql.load_model("vit_tiny_patch16_224", input_size=10**9), "of at most 16384 pixels"),
    (lambda m, q: ql.load_model("vit_tiny_patch16_224", input_size=float("nan")), "input_size is nan"),
    (lambda m, q: ql.load_model("hf:"), "hf: is no model"),
    (lambda m, q: ql.load_model(f"hf:{__file__}"), "is no model; write hf:DIR"),
    (lambda m, q: ql.load_model(__file__), "is text, which begins with"),
    (lambda m, q: ql.load_model("absent.onnx"), "absent.onnx is a file or folder"),
    (lambda m, q: ql.compare(q, q), "a QuantizedModel is no result"),
    (lambda m, q: ql.recommend(m, "embedded:digits-test", minutes=float("nan")), "minutes is nan"),
    (lambda m, q: ql.results(1), "directory is 1"),
    (lambda m, q: ql.plot(None), "a NoneType is no study"),
    (lambda m, q: ql.card(m), "name is a Model"),
    (lambda m, q: ql.push_to_hub(None, "a/b"), "name is None"),
    (lambda m, q: ql.Artefact(LONG), "too long for the name of a file"),
    (lambda m, q: ql.load_plugin(LONG), "too long for the name of a file"),
    (lambda m, q: ql.attention.compare("digits-vit", {"q": q}, IMAGES), "a str was given where a model is wanted"),
    (lambda m, q: ql.attention.compare(m, 1, IMAGES), "'int' is a int; give a model"),
    (lambda m, q: ql.attention.compare(m, {"q": q}, IMAGES, map=1), "unknown map 1"),
    (lambda m, q: ql.attention.compare(m, {"q": q}, IMAGES, map="grad-cam", target=2**70), "does not exist"),
    (lambda m, q: ql.attention.compare(m, {"q": q}, IMAGES[..., :16]), "this model takes"),
    (lambda m, q: q(np.zeros((1, 3, 32, 32), np.float32)), "is a ndarray"),
]


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    model = ql.load_model("digits-vit")
    return model, ql.quantize(model, IMAGES, method="minmax", bits="FP32")


@pytest.mark.parametrize(("call", "said"), CALLS, ids=[said[:40] for _, said in CALLS])
def test_public_calls(models, call: Callable[[Any, Any], Any], said: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QuantlensError, match=said) as caught:
        call(*models)
    assert len(str(caught.value)) < 700
    assert list(tmp_path.iterdir()) == []
