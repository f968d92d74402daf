"""Options of methods that have another name now, and those that are gone."""

from collections.abc import Mapping
from typing import Any

from quantlens._moved import DROPPED, RENAMED_ARGUMENTS, warn
from quantlens.errors import QuantlensError

RENAMED_OPTIONS: dict[str, dict[str, str]] = {
    "quantlens-best": {
        "vectors": "train_norms_and_biases",
        "views": "views_per_image",
        "activations": "activation_granularity",
    },
    "quantlens-fast": {
        "norms": "rotate_norm_outputs",
        "hidden": "rotate_mlp_hidden",
        "centre": "subtract_mean",
        "activations": "activation_granularity",
        "block": "group_size",
    },
}
"""Method -> old option -> new option."""

_VALUES = {"activation_granularity": {"block": "group"}, "softmax": {"rows": "sqrt"}}
RENAMED_VALUES: dict[str, dict[str, dict[Any, Any]]] = {
    "quantlens-best": _VALUES,
    "quantlens-fast": {
        **_VALUES,
        "rotate_norm_outputs": {"residual": "none", "blocks": "all"},
    },
}
"""Method -> option of today -> old value -> new value."""

_START = {"layernorm": "reparameterized", "attention": "head", "softmax": "uniform", "token_scales": False}
_DROPPING = {"lr_rounding": 0.03, "lr_scales": 0.01, "drop": 0.5, "input_drop": 0.5, "rounding": "straight-through"}
_SEARCH = {"alpha": 0.5, "beta": 1.2}

FIXED: dict[str, dict[str, Any]] = {
    "adalog": {"log": "both", "layernorm": "reparameterized", "attention_granularity": "head"},
    "aocq": {"softmax": "auto", "lr_rounding": 0.03, "lr_scales": 0.003},
    "aphq-vit": {**_START, **_DROPPING, "loss": "aph", "step": 0.01, "mlp": "relu", "lr_mlp": 0.02},
    "base-ptq": {**_SEARCH, "nonnegative": "signed"},
    "bit-split": {"weights": "response", "inputs": "quantized", "bias_correction": False},
    "easyquant": {**_SEARCH, "beta": 2.0, "nonnegative": "unsigned"},
    "erq": {"activation_error": "ridge", "weight_error": "halves", "flips": 100},
    "fima-q": {**_START, **_DROPPING, "loss": "dplr", "damping": 0.001},
    "fq-ptq": {"observer": "minmax", "ptf": "residual", "exponents": "squared", "largest_exponent": 7},
    "gptq": {"block": 128, "inputs": "network", "weight_range": "quantile"},
    "i-and-s-vit": {
        **_START,
        "attention": "tensor",
        "softmax": "shifted-log2",
        "smooth": True,
        "lr_float": 0.002,
        "lr_weights": 0.02,
    },
    "ptq4vit": {"gradient": "fisher", "floor": 1.0, "twin": "both", "gelu_steps": "shift", "alpha": 0.01, "beta": 1.2},
    "qdrop": {**_START, **_DROPPING},
    "vt-ptq": {
        **_SEARCH,
        "ranking_weight": 1.0,
        "ranking_margin": 0.1,
        "ranking_pairs": None,
        "nonnegative": "unsigned",
    },
}
"""Method -> option -> its default, which is what the method does since the option is gone (or what its variant ``ours``
does)."""

_GONE = {
    ("quantlens-best", "distillation"): ("distillation", "distilled", "features", "plain", "strange"),
    ("quantlens-best", "rounding-or-weights"): ("train", "lr_weights"),
    ("quantlens-best", "quantlens-best-training"): ("loss", "lr_rounding", "lr_scales", "input_drop", "drop"),
    ("quantlens-best", "quantlens-best-start"): (
        *("fitted", "rotate", "centre", "norms", "hidden"),
        *("fit", "rounding", "damping", "block"),
    ),
    ("quantlens-fast", "quantlens-fast-parts"): ("fit", "rounding"),
    **{(method, "options-of-methods"): tuple(values) for method, values in FIXED.items()},
}
REMOVED_OPTIONS: dict[str, dict[str, str]] = {}
"""Method -> option -> the page that tells what it gave."""
for (_method, _page), _names in _GONE.items():
    REMOVED_OPTIONS.setdefault(_method, {}).update(dict.fromkeys(_names, f"research/2026-11-29-{_page}.md"))

REMOVED_IN = "0.3"


def current_options(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` options of a method under the names of today; an old name gets a DeprecationWarning. Raises
    QuantlensError for an option that is gone, and for one that is given under both names."""
    renamed = RENAMED_ARGUMENTS | RENAMED_OPTIONS.get(method, {})
    removed, values, found = REMOVED_OPTIONS.get(method, {}), RENAMED_VALUES.get(method, {}), {}
    for name, value in given.items():
        if name in removed:
            raise QuantlensError(
                f"option {name} of {method} was removed in quantlens {REMOVED_IN}; {removed[name]} tells what it gave"
            )
        new = renamed.get(name, name)
        if new != name and new in given:
            raise QuantlensError(f"{method}: {name} is the old name of {new}; give one of them")
        if new != name:
            warn(f"quantlens: option {name} of {method} is {new} now; quantlens {DROPPED} drops the old name")
        found[new] = values.get(new, {}).get(value, value) if isinstance(value, str) else value
        if found[new] is not value:
            warn(
                f"quantlens: {new}={value} of {method} is {new}={found[new]} now; quantlens {DROPPED} drops the old "
                "value"
            )
    return found


LATER = {"variant": "ours", "block_scale": "absmax"}
"""Options that came later: with these values, a method does what it did before."""


def former_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All ``options`` of a method as keys of cells spell them, so that a change of names runs no cell again: with names
    and options of the release before they changed."""
    found = {**FIXED.get(method, {}), **options}
    for old, new in RENAMED_ARGUMENTS.items():
        found[old] = found.pop(new)
    for later, usual in LATER.items():
        if found.get(later) == usual:
            del found[later]
    return found
