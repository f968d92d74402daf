"""`quantlens sources`: how images are named on the command line and in study files."""

from quantlens.cli import _common

HELP = """Explain how images are named (SOURCE), list the sets that ship, and the OOD sets whose names are known.

Wherever a command or a study file takes a SOURCE, it is written as shown here.

[bold]Examples[/bold]

    quantlens sources
"""

GRAMMAR = (
    ("KIND:PATH", "all images, in the sorted order of their names"),
    ("KIND:PATH[a:b]", "images a to b of that order (b excluded), as Python slices: [:100], [-50:]"),
    ("KIND:PATH[a:b:s]", "every s-th of them: [::2] and [1::2] are two halves that share no image"),
    ("KIND:PATH?n=200&seed=0", "a random sample of 200, drawn with the seed"),
    ("KIND:PATH[0:1000]?n=32&seed=0", "a random sample from a slice"),
    (
        "KIND:PATH?corrupt=fog:3",
        "every picture corrupted, by the name and the severity (1 to 5) of a corruption, below",
    ),
    ("KIND:PATH?split=test&n=200", "keys that a kind has, below, stand there too"),
    ("KIND:PATH/", "a folder whose name ends like one of these: what stands before a slash is its name"),
)


def sources() -> None:
    """See HELP."""
    from quantlens.data import CORRUPTIONS, available_embedded, available_sources
    from quantlens.data.ood_sets import OOD_SETS

    kinds = [(f"{name}:{kind.what.upper()}", kind.description) for name, kind in available_sources().items()]
    shipped = [(f"embedded:{name}", info.group, info.description) for name, info in available_embedded().items()]
    corruptions = [(name, found.kind + ", extra" * found.extra, found.what) for name, found in CORRUPTIONS.items()]
    known = [(name, one.title, one.group, f"{one.images} images: {one.description}") for name, one in OOD_SETS.items()]
    console = _common.console()
    console.print(_common.table(["written", "meaning"], GRAMMAR, title="A SOURCE is"))
    console.print(_common.table(["kind", "images"], kinds, title="Kinds"))
    console.print(_common.table(["source", "group", "images"], shipped, title="Sets that ship with quantlens"))
    console.print(_common.table(["corruption", "kind", "what it is"], corruptions, title="Corruptions of ImageNet-C"))
    console.print(
        _common.table(["name", "set", "group", "images"], known, title="OOD sets whose group is known by name")
    )
    print("Nothing is downloaded: docs/ood.md says where they lie. --ood ninco=images:DIR is near, as in OpenOOD.")
    print("On a command line, put a SOURCE with [ ] or ? in quotes: 'imagenet:val[0:400]'.")
