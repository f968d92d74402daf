"""The lens: attention of all blocks, and the blocks' tokens, read in the same pass as the logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantlens.ambient import isolated, plain_arithmetic
from quantlens.attention.rollout import rollout
from quantlens.errors import UnsupportedError
from quantlens.graph import Graph
from quantlens.qmodel import QuantizedModel, float_model, simulate
from quantlens.qmodel.model import pooled

WINDOWED = (
    "attention is computed in windows or at several resolutions (Swin and its kind): no map leads from a class token "
    "to the patches. Grad-CAM works on such models (`quantlens attention --map grad-cam`)"
)


class Layout(NamedTuple):
    """Where patches are: ``prefix`` class and register tokens, then patches on a grid of (rows, columns)."""

    prefix: int
    grid: tuple[int, int]


class View(NamedTuple):
    """What a lens sees of a batch: logits [B, K] (:func:`class_logits`); attention of every block, [B, H, N, N] each;
    tokens that every block puts out, [B, N, C] each."""

    logits: Tensor
    probs: tuple[Tensor, ...]
    tokens: tuple[Tensor, ...]


def class_logits(logits: Tensor) -> Tensor:
    """[B, K] of what a model gives. One logit x is that of two classes, −x/2 and x/2, whose softmax is its sigmoid."""
    logits = pooled(logits)
    return torch.cat([-logits / 2, logits / 2], dim=1) if logits.shape[1] == 1 else logits


def probabilities(model: Any, logits: Tensor) -> Tensor:
    """Of :func:`class_logits`: a softmax over the classes, or a sigmoid for each of several labels."""
    return logits.sigmoid() if model.task == "multilabel" else logits.softmax(1)


def has_classes(model: Any) -> bool:
    """Whether a model, float or quantized, gives logits of classes, not features."""
    return model.task not in ("features", "zero-shot")


def check_task(model: Any) -> None:
    """Raises UnsupportedError for a detector: its answers are those of queries, which have places of their own among
    the tokens, and no class token."""
    if model.task == "detect":
        raise UnsupportedError(
            f"{model.name} is a detector, which reads its boxes off queries: maps of attention are of models with one "
            "answer for an image; `quantlens inspect` says what quantizing its attention does"
        )


class Lens:
    """Looks into a model, float or quantized: a :class:`quantlens.models.Model` or a
    :class:`~quantlens.qmodel.QuantizedModel`.

    Attention is read after its quantizer, as the product with the values sees it. Raises UnsupportedError for models
    without attention over all tokens: windowed attention (Swin) has no map from class token to patches, and for
    detectors.
    """

    def __init__(self, model: Any):
        self.model: QuantizedModel = float_model(model)
        check_task(self.model)
        graph, plan, self.device = self.model.graph, self.model.plan, self.model.device
        self.sites = attention_sites(graph)
        self.layout = layout_of(graph)
        outputs = {site.node: site.edges["output"].key for site in graph.sites if "output" in site.edges}
        results = {b.name: outputs[b.result] for b in graph.sites.blocks if b.result in outputs}
        self.blocks = list(results)
        taps = [*(f"{site}.output" for site in self.sites), *results.values()]
        self._module = simulate(graph, plan.quantizers, plan.operators, taps)

    def __call__(self, images: Tensor) -> View:
        """images [B, 3, H, W], prepared as the model wants them. Gradients pass (straight through quantizers)."""
        with plain_arithmetic():
            (images,) = self.model.graph.tensors_of([images], {})
            logits, _, taps = self._module(images.contiguous())
        return View(class_logits(logits), tuple(taps[: len(self.sites)]), tuple(taps[len(self.sites) :]))

    @isolated
    def rollout(self, images: Tensor, **settings: Any) -> Tensor:
        """Rollout maps [B, P]; see :func:`~quantlens.attention.rollout.rollout` for the settings."""
        with torch.no_grad():
            return self.rollout_of(self(images), **settings)

    def rollout_of(self, view: View, **settings: Any) -> Tensor:
        """The same from what was seen already."""
        return rollout(view.probs, prefix=self.layout.prefix, **settings)


def lens_of(model: Any) -> Lens:
    """The lens of a model; a lens as it is."""
    return model if isinstance(model, Lens) else Lens(model)


def attention_sites(graph: Graph) -> list[str]:
    """Names of the ``probs`` sites, in order. Raises UnsupportedError where attention is not over all tokens."""
    sites = graph.sites.of_kind("probs")
    if not sites:
        raise UnsupportedError("the model has no attention that the graph shows; there is nothing to look at")
    shapes = {tuple(site.node.meta["shape"] or ())[1:] for site in sites}
    if len(shapes) > 1 or any(len(s) != 3 or s[-1] != s[-2] or s[-1] is None for s in shapes):
        raise UnsupportedError(WINDOWED)
    return [site.name for site in sites]


def layout_of(graph: Graph) -> Layout:
    """Where the patches of a model's tokens are, from the patch embedding and the attention's size."""
    tokens = graph.sites.of_kind("probs")[0].node.meta["shape"][-1]
    for site in graph.sites.of_kind("conv"):
        shape = site.node.meta["shape"]
        if graph.is_image(site.edges["input"].value) and len(shape) == 4 and None not in shape[1:]:
            prefix = tokens - shape[2] * shape[3]
            if not 0 <= prefix <= max(16, tokens // 8):
                raise UnsupportedError(WINDOWED)
            return Layout(prefix, (shape[2], shape[3]))
    raise UnsupportedError("no patch embedding (a convolution of the image) was found: the grid of patches is unknown")
