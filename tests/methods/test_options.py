"""What is asked for wrongly is named, for every method of the registry."""

from __future__ import annotations

import pytest

import quantlens as ql
from quantlens.errors import QuantlensError, UnknownNameError
from quantlens.methods import registry
from quantlens.methods.base import SHARED_OPTIONS

NONSENSE = {
    "adalog": [({"rounds": 0}, "rounds"), ({"steps": 0}, "steps"), ({"candidates": 3}, "candidates")],
    "aocq": [({"iterations": -1}, "iterations")],
    "aphq-vit": [({"mlp_iterations": -3}, "mlp_iterations")],
    "bit-split": [({"rounds": 0}, "rounds")],
    "erq": [
        ({"activation_damping": 0.0}, "activation_damping"),
        ({"weight_damping": -1.0}, "weight_damping"),
    ],
    "fima-q": [({"rank": 0}, "rank")],
    "gptq": [({"damping": 0.0}, "damping"), ({"damping": -1.0}, "damping")],
    "i-and-s-vit": [({"iterations": 2.5}, "iterations")],
    "percentile": [({"p": 0.3}, "0.5")],
    "ptq4vit": [({name: 0}, name) for name in ("candidates", "rounds")],
    "qdrop": [({"iterations": -1}, "iterations"), ({"batch_size": 0}, "batch_size")],
    "quantlens-best": [({"views_per_image": -1}, "views_per_image"), ({"ood_view_share": 1.5}, "ood_view_share")],
    "quantlens-fast": [({"damping": 0}, "damping")],
    "vt-ptq": [({"candidates": 0}, "candidates")],
}  # fmt: skip
"""Numbers of the right kind that make no sense, and a word of what is said."""


@pytest.mark.parametrize(
    ("method", "options", "message"), [(method, *case) for method, cases in NONSENSE.items() for case in cases]
)
def test_numbers_without_sense_are_refused(method, options, message, loaded, pictures):
    with pytest.raises(QuantlensError, match=message):
        ql.quantize(loaded["vit"], pictures, method=method, bits="W4A4", **options)


@pytest.mark.parametrize("method", sorted(registry.available()))
def test_misspelt_options_and_choices_are_named(method):
    one = registry.get(method)
    for name, option in {**SHARED_OPTIONS, **one.info.options}.items():
        with pytest.raises(UnknownNameError, match=name):
            one.options({name[:-1] + "~": option.default})
        if option.choices is not None:
            with pytest.raises(QuantlensError, match=f"{name}='nonsense'; choose one of"):
                one.options({name: "nonsense"})


def test_a_misspelt_option_reaches_the_caller(loaded, pictures):
    with pytest.raises(QuantlensError, match="layernorm"):
        ql.quantize(loaded["vit"], pictures, method="repq-vit", layernrom="tensor")


@pytest.mark.parametrize("option", ["patch_bits", "head_bits"])
@pytest.mark.parametrize("value", [0, 1, 2.5, 17, "a", True])
def test_widths_that_there_are_not(option, value):
    with pytest.raises(QuantlensError, match="give 2 to 16 bits, or 32 for float"):
        registry.get("minmax").options({option: value})


def test_numbers_are_numbers_in_every_method():
    for name, info in registry.available().items():
        for key, option in info.options.items():
            if option.choices is None and type(option.default) in (int, float):
                for value in ("x", True, [1]):
                    with pytest.raises(QuantlensError, match="number, such as"):
                        registry.get(name).options({key: value})
            if type(option.default) is int and option.choices is None:
                with pytest.raises(QuantlensError, match="whole number, such as"):
                    registry.get(name).options({key: 2.5})
