"""`quantlens verify`: whether an exported file holds the integers of a checkpoint."""

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

HELP = """Compare an exported file with the checkpoint that it was made from: every code of every weight, every scale
and zero point, site by site.

They are read from the file's own constants and from the operations that use them, not from what it says of itself; that
is compared too: the digest of the plan names another checkpoint's file, and the digest of the content a file that was
changed. Sites without integers in the file are named. The exit code is 1 where something differs.

[bold]Examples[/bold]

    quantlens verify digits.onnx d.safetensors

    quantlens verify digits.xml d.safetensors --json
"""


def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An exported file: .onnx, .xml or .pt2.")],
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="What `quantize` wrote (.safetensors).")],
    json: Annotated[bool, typer.Option("--json", help="Print all that was found as JSON.")] = False,
) -> None:
    """See HELP."""
    from quantlens.export.verify import verify as compare

    found = compare(file, checkpoint)
    print(dumps(found.to_dict(), indent=1, ensure_ascii=False) if json else "\n".join(found.sentences()))
    if not found.ok:
        raise typer.Exit(1)
