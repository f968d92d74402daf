"""`quantlens models`: names that MODEL may be."""

import fnmatch
from typing import Annotated, Any

import typer

from quantlens.cli import _common
from quantlens.errors import QuantlensError

HELP = """List the models that ship with quantlens, and say how models of timm and of Hugging Face are named.

A tag after a dot chooses the weights of the hub: vit_small_patch16_224.augreg_in21k_ft_in1k. Your own weights are given
with --weights FILE (.safetensors, .pth, .pt, .ckpt, or .npz of AugReg). A model of Hugging Face is hf:ID, or hf:DIR for
a folder of save_pretrained.

[bold]Examples[/bold]

    quantlens models

    quantlens models --filter 'deit*_small*'

    quantlens models --filter 'swin_tiny*' --tags
"""

EXAMPLES = (
    "deit_tiny_patch16_224",
    "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "deit3_small_patch16_224.fb_in22k_ft_in1k",
    "swin_tiny_patch4_window7_224.ms_in1k",
)


def models(
    filter: Annotated[
        str | None, typer.Option("--filter", metavar="PATTERN", help="Names of timm that match, such as 'vit*'.")
    ] = None,
    tags: Annotated[bool, typer.Option("--tags", help="With --filter: names with the tags of their weights.")] = False,
) -> None:
    """See HELP."""
    from quantlens import zoo

    if filter is not None:
        import timm

        found = fnmatch.filter(zoo.available(), filter) + timm.list_models(filter, pretrained=tags)
        if not found:
            raise QuantlensError(f"no model matches {filter!r}; try a wider pattern, such as '*{filter.strip('*')}*'")
        print("\n".join(found))
        return
    rows = [(name, entry.description, *_measured(entry.card())) for name, entry in zoo.available().items()]
    heads = ["name", "what it is", "parameters", "measured", "AUPR-out"]
    title = "Models that ship with quantlens"
    _common.console().print(
        _common.table(heads, rows, title=title, right={"parameters"}, whole={"name", "measured", "AUPR-out"})
    )
    print("Any vision transformer of timm by its name, with or without the tag of its weights:")
    for example in EXAMPLES:
        print(f"  {example}")
    print(
        "Any image classifier, image encoder or detection transformer of Hugging Face, by its ID or the folder of "
        "save_pretrained:"
    )
    print("  hf:google/vit-base-patch16-224")
    print("  hf:facebook/detr-resnet-50")
    print("`quantlens models --filter 'vit*'` lists names; add --tags for the weights of the hub.")


def _measured(card: dict[str, Any]) -> tuple[str, str, str]:
    """Parameters, what the recipe measured on embedded images, and AUPR-out against each OOD set."""
    from quantlens.metrics import METRICS

    figures = card["figures"]
    found = "\n".join(f"{METRICS[k].title} {100 * figures[k]:.1f} %" for k in ("top1", "map", "map50") if k in figures)
    ood = "\n".join(f"{100 * one['aupr_out']:.1f} % {name}" for name, one in figures.get("ood", {}).items())
    return f"{card['num_parameters']:,}", f"{found}\n{figures['n']} images", ood
