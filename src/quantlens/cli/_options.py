"""Arguments and options that several commands have, under one wording."""

from pathlib import Path
from typing import Annotated

import typer

# -- the model
ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="Name of the model, or hf:ID or hf:DIR of Hugging Face.")
]
ModelOrCheckpoint = Annotated[
    str, typer.Argument(metavar="MODEL", help="Name of a model (or hf:ID, hf:DIR), or a quantized checkpoint.")
]
Card = Annotated[bool, typer.Option("--card", help="Write a model card (README.md) beside the checkpoint.")]
Weights = Annotated[
    str | None,
    typer.Option(metavar="W", help="A checkpoint file, [bold]pretrained[/bold] (the default) or random."),
]
Reference = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The float model that another tool's file came from; --weights are its own."),
]
InputSize = Annotated[
    int | None,
    typer.Option(metavar="PX", min=1, help="Side of its images, if not its own: position embeddings are resampled."),
]
Letterbox = Annotated[
    bool, typer.Option("--letterbox", help="A detector sees pictures whole, with a border, and not stretched.")
]

# -- images
CalibrationSource = Annotated[
    str,
    typer.Option(metavar="SOURCE", help="Calibration images (`quantlens sources`); none: made ones, if you have none."),
]
CalibrationCount = Annotated[
    int | None, typer.Option("--n", min=1, help="How many calibration images the seed draws (default: 32).")
]
OodSets = Annotated[
    list[str] | None, typer.Option(metavar="NAME=SOURCE", help="An out-of-distribution set; may be repeated.")
]
ShiftedSets = Annotated[
    list[str] | None,
    typer.Option("--shift", metavar="NAME=SOURCE", help="Further labelled images of the classes; may be repeated."),
]
Corruptions = Annotated[
    list[str] | None,
    typer.Option(
        "--corrupt",
        metavar="NAME[:SEVERITY]",
        help="Measure on corruptions of the ID images, too: fog:3, fog (1 to 5) or all; may be repeated.",
    ),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be read, and say how many.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Do not keep decoded images on disk.")]

# -- the quantization
MethodName = Annotated[str, typer.Option(help="The method (`quantlens methods`).")]
MethodOptions = Annotated[
    list[str] | None, typer.Option("--option", "-o", metavar="KEY=VALUE", help="An option of the method.")
]
ARGUMENTS = {
    "patch_bits": Annotated[
        int | None, typer.Option(help="Width of the image that the patch embedding reads (8; 32: float).")
    ],
    "head_bits": Annotated[int | None, typer.Option(help="Width of the classifier (as everywhere).")],
    "outlier_channels": Annotated[
        str | None,
        typer.Option(metavar="keep|split", help="Give outlier channels a layer of their own, exactly: split."),
    ],
    "image": Annotated[
        str | None, typer.Option(metavar="range|pixels", help="Codes of an 8-bit image; pixels is exact.")
    ],
    "target": Annotated[
        str | None,
        typer.Option(help="Stay inside a runtime's integers: openvino-cpu, onnxruntime-cpu, tensorrt, qnn, xnnpack."),
    ],
}
"""What every method takes."""
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="Draws the calibration images, and all else that is random.")
]

# -- what is measured
Scores = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAMES",
        help="OOD scores (default: all that fit the task): msp, maxlogit, energy, entropy, gen, knn, vim, mahalanobis, "
        "rmahalanobis (relative), mahalanobis_l2, rmahalanobis_l2, react; binary and multilabel: joint_energy, "
        "sigmoid_confidence; detectors: max_confidence, joint_energy. By name alone: kl_matching, she, "
        "msp_temperature; near chance on transformers: ash_p, ash_b, ash_s, scale, dice.",
    ),
]
Task = Annotated[
    str | None,
    typer.Option(metavar="TASK", help="classify, zero-shot, binary, multilabel or features (default: the model's)."),
]
ModelTask = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="TASK",
        help="What it is for, if it does not say: multilabel …; features drops its classifier.",
    ),
]
TextEmbeddings = Annotated[
    str | None, typer.Option(metavar="FILE", help="Text embeddings [K, D] for zero-shot: .npy, .npz or .safetensors.")
]

# -- the run
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="FILE_OR_MODULE",
        help="Load methods, formats, scores and transforms of your own (docs/extending.md); may be repeated.",
    ),
]

# -- what is read
StudyDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="The --out directory of a study.")]
