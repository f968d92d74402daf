"""Sites and blocks quantized alone, against whole forwards of the model with only them quantized."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import quantlens as ql
from detectors import selecting
from quantlens.calibration import CHUNK
from quantlens.data import Preprocess
from quantlens.errors import QuantlensError, UnknownNameError, UnsupportedError
from quantlens.graph import choices
from quantlens.methods.base import matmul_operand_edges
from quantlens.metrics.divergence import BOX_WEIGHT
from quantlens.qmodel import Plan, QuantizedModel
from quantlens.sensitivity import inspect
from quantlens.zoo.detector_losses import overlaps

EVERYTHING = ("site", "block", "edge")


def naive(quantized: QuantizedModel, keys: list[str], images: torch.Tensor) -> tuple[float, float, float]:
    """SQNR in dB, KL and share of changed predictions of the model with some edges quantized, by whole forwards."""
    plan = Plan({key: quantized.plan.quantizers[key] for key in keys})
    with torch.no_grad():
        logits = QuantizedModel(quantized.graph.clone(), plan, preprocess=None)(images).double()
        expected = quantized.graph(images).double()
    ratio = expected.square().sum() / (logits - expected).square().sum()
    kl = nn.functional.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean")
    return 10 * math.log10(ratio), float(kl), float((logits.argmax(1) != expected.argmax(1)).double().mean())


def check(found, quantized: QuantizedModel, images: torch.Tensor, every: int = 1) -> None:
    """Every site, block and edge; or some of them, the first and the last of each sort among them."""
    for part in [part for parts in found.parts.values() for part in (*parts[:-1:every], parts[-1])]:
        keys = [edge.key for edge in part.edges]
        if part.kind == "block":
            keys = [k for k in quantized.plan.quantizers if k.startswith(f"{part.name}.")]
        sqnr, kl, changed = naive(quantized, keys, images)
        assert part.effect.sqnr_db == pytest.approx(sqnr, abs=0.02), part.name
        assert part.effect.kl == pytest.approx(kl, rel=5e-3, abs=1e-9), part.name
        assert part.effect.changed == pytest.approx(changed), part.name


@pytest.mark.parametrize(
    ("kind", "by", "rows"),
    [
        ("vit", ("site", "block"), 3),
        ("vit", EVERYTHING, 12),
        ("swin", ("site", "block"), 12),
        ("deit-distilled", ("site", "block"), 8),
        ("plain", ("site", "block"), 20),
        ("torchvision", ("site", "block"), 8),
    ],
)
def test_effects_are_those_of_whole_forwards(kind, by, rows, loaded, pictures):
    """With four images, 3 rows run variants one by one in two goes, 12 three at a time. Patch embedding and head
    included."""
    model = loaded[kind]
    pictures = pictures[:4]
    found = inspect(model, pictures, "W4A4", by=by, rows=rows)
    quantized = ql.quantize(model, pictures, method="minmax", bits="W4A4")
    edges = [edge.key for edge in matmul_operand_edges(quantized.graph)]
    sites = quantized.graph.sites
    if "edge" in by:
        assert [part.name for part in found.parts["edge"]] == sorted(edges, key=list(sites.edges).index)
    assert {part.name for part in found.sites} == {sites.edges[key].site for key in edges}
    assert {"patch_embed.proj", "patches", "conv_proj"} & {part.name for part in found.sites}
    assert {site.name for site in sites.head} <= {part.name for part in found.sites}
    assert [part.name for part in found.blocks] == [block.name for block in sites.blocks]
    check(found, quantized, pictures, every=1 if rows == 3 else 5)


@pytest.mark.parametrize(("method", "bits"), [("repq-vit", "W4A4"), ("percentile", "W32A4"), ("fq-vit", "W8A8")])
def test_other_methods_quantizers(method, bits, loaded, pictures):
    model = loaded["vit"]
    if method == "fq-vit":
        with pytest.raises(UnsupportedError, match="integers throughout"):
            inspect(model, pictures, bits, method=method)
        return
    quantized = ql.quantize(model, pictures, method=method, bits=bits)
    check(inspect(model, pictures, bits, method=method), quantized, pictures, every=5)


def test_several_chunks_of_images(loaded, pictures):
    images = torch.cat([pictures * scale for scale in (1.0, 0.9, 0.7, -1.0, 0.5)])
    assert len(images) > CHUNK
    found = inspect(loaded["vit"], images, "W4A4", rows=80)
    check(found, ql.quantize(loaded["vit"], images, method="minmax", bits="W4A4"), images, every=5)


def planted(small_models, change) -> ql.Model:
    import copy

    network = copy.deepcopy(small_models["vit"])
    change(network)
    return ql.load_model(network, input_size=(3, 32, 32), name="planted")


def test_a_planted_outlier_ranks_first_and_is_named(small_models, pictures):
    """One hidden channel of the MLP that is huge, and is read with a weight so small that the logits hardly know it."""

    def massive(network):
        block = network.blocks[1].mlp
        block.fc1.bias[11] += 2000.0
        block.fc2.weight[:, 11] *= 1e-4

    before = inspect(planted(small_models, lambda network: None), pictures, "W8A8")
    assert before.ranked()[0].name != "blocks.1.mlp.fc2"
    found = inspect(planted(small_models, massive), pictures, "W8A8", by=EVERYTHING)
    first = found.ranked()[0]
    assert (first.name, found.ranked("block")[0].name) == ("blocks.1.mlp.fc2", "blocks.1")
    assert found.ranked("edge")[0].name == "blocks.1.mlp.fc2.input"
    assert found.ranked(rank="kl")[0].name == "blocks.1.mlp.fc2"
    entry = first.edges[0]
    assert entry.massive == (11,)
    assert entry.peaks[0] > 1900 > 100 * entry.rest
    assert first.remark().startswith("input channel 11: ")


def test_a_planted_dead_channel_is_named(small_models, pictures):
    def dead(network):
        network.blocks[0].norm2.weight[[3, 20]] = 0.0
        network.blocks[0].mlp.fc1.weight[9] = 0.0

    found = inspect(planted(small_models, dead), pictures, "W8A8", by="site")
    (site,) = [part for part in found.sites if part.name == "blocks.0.mlp.fc1"]
    assert {edge.name: edge.dead for edge in site.edges} == {"input": (3, 20), "weight": (9,)}
    assert site.remark() == "input: 2 dead channels; weight: 1 dead channel"


def test_ranks_order_by_what_they_say(loaded, pictures):
    found = inspect(loaded["vit"], pictures, "W3A3")
    sqnr = [part.effect.sqnr_db for part in found.ranked()]
    kl = [part.effect.kl for part in found.ranked(rank="kl")]
    assert sqnr == sorted(sqnr)
    assert kl == sorted(kl, reverse=True)
    with pytest.raises(UnsupportedError, match="no boxes"):
        found.ranked(rank="iou")
    assert len(sqnr) == len(found.sites)


def test_other_tasks_have_a_divergence_of_their_own_or_none(loaded, pictures):
    """A sigmoid for every label; features have no classes."""
    vit = loaded["vit"]
    given = {"preprocess": vit.preprocess, "input_size": None}
    model = ql.load_model(vit.module, **given, task="multilabel")
    found = inspect(model, pictures, "W3A3", by="block").blocks[0]
    quantized = ql.quantize(model, pictures, method="minmax", bits="W3A3")
    plan = Plan({key: q for key, q in quantized.plan.quantizers.items() if key.startswith(f"{found.name}.")})
    with torch.no_grad():
        after = QuantizedModel(quantized.graph.clone(), plan, preprocess=None)(pictures).double()
        before = quantized.graph(pictures).double()
    p, q = before.sigmoid(), after.sigmoid()
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert found.effect.kl == pytest.approx(float(kl.sum(1).mean()), rel=5e-3)
    assert found.effect.changed == pytest.approx(float(((before > 0) != (after > 0)).any(1).double().mean()))
    features = inspect(ql.load_model(vit.module, **given, task="features"), pictures, by="block")
    assert features.blocks[0].effect.kl is None
    assert features.blocks[0].effect.sqnr_db is not None
    with pytest.raises(UnsupportedError, match="gives features"):
        features.ranked("block", "kl")


def test_a_model_that_gives_tokens(pictures):
    """Its features are those of the first token, and the noise is that of all."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.mix = nn.Conv2d(3, 8, 16, 16), nn.Linear(8, 8)

        def forward(self, images):
            return self.mix(self.patches(images).flatten(2).transpose(1, 2))

    preprocess = ql.load_model("digits-vit").preprocess
    found = inspect(ql.load_model(Tokens(), preprocess=preprocess, task="features"), pictures, by="site")
    assert {site.name for site in found.sites} == {"patches", "mix"}
    assert all(site.effect.sqnr_db > 20 for site in found.sites)


def test_the_file_is_plain_json(loaded, pictures, tmp_path):
    found = inspect(loaded["swin"], pictures, "W6A6", by=EVERYTHING)
    data = json.loads(found.save(tmp_path / "found.json").read_text())
    assert data["model"] == "swin"
    assert data["bits"] == "W6A6"
    assert data["images"]["n"] == len(pictures)
    assert [s["name"] for s in data["sites"]] == [s.name for s in found.sites]
    assert data["sites"][0]["effect"]["sqnr_db"] == found.sites[0].effect.sqnr_db
    assert {len(data[key]) for key in ("sites", "blocks", "edges")} == {len(parts) for parts in found.parts.values()}


def test_mistakes_are_told(loaded, pictures):
    vit = loaded["vit"]
    with pytest.raises(QuantlensError, match="quantizes nothing"):
        inspect(vit, pictures, "FP32")
    with pytest.raises(UnknownNameError, match="granularity 'layer'"):
        inspect(vit, pictures, by=("layer",))
    with pytest.raises(UnknownNameError, match="option of minmax"):
        inspect(vit, pictures, p=3)
    with pytest.raises(UnknownNameError, match="rank 'mse'"):
        inspect(vit, pictures).ranked(rank="mse")


def test_a_method_that_changes_weights_is_refused(loaded, pictures):
    with pytest.raises(UnsupportedError, match="changes the model's weights"):
        inspect(loaded["vit"], pictures, "W3A3", method="bit-split")


def test_public_face_and_mixed_precision(loaded, pictures):
    """Widths of an allocation: every site is quantized at its own."""
    vit = loaded["vit"]
    allocation = ql.allocate(vit, pictures, "MP5", sensitivity="random", seed=3)
    found = ql.inspect(vit, pictures, allocation, by="site", rows=64)
    assert isinstance(found, ql.Inspection)
    assert (found.model, found.method, found.bits) == ("vit", "minmax", allocation.name)
    groups = {group.name: group.bits for group in allocation.groups}
    assert len(set(groups.values())) > 1
    for name, bits in groups.items():
        inside = [part.bits for part in found.sites if part.name.startswith(f"{name}.")]
        assert inside
        assert set(inside) <= {f"W{bits}A{bits}", f"A{bits}"}


class Detects(nn.Module):
    """Class logits and boxes of four tokens."""

    def __init__(self):
        super().__init__()
        self.body, self.mix = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 8)
        self.kind, self.box = nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, images):
        x = self.mix(self.body(images).flatten(2).mT.relu())
        return {"pred_boxes": self.box(x).sigmoid(), "logits": self.kind(x)}


def test_a_detector_is_inspected_by_its_class_logits_and_boxes():
    torch.manual_seed(0)
    square = Preprocess((3, 16, 16), resize=(16, 16))
    module = Detects().eval()
    with torch.no_grad():  # some queries see no object
        module.kind.weight *= 12
        module.kind.bias[-1] += 1
    model = ql.load_model(module, preprocess=square, class_names=["cat", "dog"])
    images = torch.randn(8, 3, 16, 16)
    quantized = ql.quantize(model, images, method="minmax", bits="W4A4")
    parts = {part.name: part for part in inspect(model, images, bits="W4A4", by="site").parts["site"]}
    keys = [edge.key for edge in parts["mix"].edges]
    plan = Plan({k: quantized.plan.quantizers[k] for k in keys})
    alone = QuantizedModel(quantized.graph.clone(), plan, preprocess=None)
    with torch.no_grad():
        before, after = (m(images) for m in (quantized.graph, alone))
    (z, boxes), (got, moved) = ((x["logits"].double(), x["pred_boxes"].double()) for x in (before, after))
    kl = nn.functional.kl_div(got.log_softmax(-1), z.log_softmax(-1), log_target=True, reduction="sum") / 32
    relative = (moved - boxes) / boxes[..., 2:].repeat(1, 1, 2)
    objects = 1 - z.softmax(-1)[..., -1]
    effect = parts["mix"].effect
    assert effect.kl == pytest.approx(float(kl + BOX_WEIGHT * (relative.square().sum(-1) * objects).mean()), rel=1e-3)
    noise = [(y - x).square().sum() / x.square().sum() for x, y in ((z, got), (boxes, moved))]
    assert effect.sqnr_db == pytest.approx(-10 * math.log10(sum(noise) / 2), abs=0.02)
    assert effect.changed == pytest.approx(float((got.argmax(-1) != z.argmax(-1)).double().mean()))
    corners = (torch.cat((b[..., :2] - b[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2), -1) for b in (moved, boxes))
    same = got.argmax(-1) == z.argmax(-1)
    assert (objects < 0.3).any()
    shares = (overlaps(*corners)[0] * same)[objects > 0.3]
    assert effect.matched_iou == pytest.approx(float(shares.mean()), rel=1e-4)
    found = inspect(model, images, bits="W4A4", by="site")
    order = [part.effect.matched_iou for part in found.ranked()]
    assert order == sorted(order)
    assert found.ranked() == found.ranked(rank="iou")
    assert parts["box"].effect.changed == 0.0 < parts["box"].effect.kl
    blocks = inspect(model, images, bits="W4A4").blocks
    assert {part.name for part in blocks} == {"body", "mix", "kind", "box"}


def test_queries_that_a_detector_selects_are_those_of_the_float_model():
    """By whole forwards that read at its places; the scores that others would be chosen by change nothing there."""
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    model = selecting()
    quantized = ql.quantize(model, images, method="minmax", bits="W3A3")
    graph, quantizers = quantized.graph, quantized.plan.quantizers
    found = inspect(model, images, "W3A3", rows=12)
    (chosen,), outputs = choices(graph), [graph.output, graph.boxes]
    nodes = [node for node in graph.fx.nodes if node.op == "call_function"]
    with torch.no_grad():
        before = graph.run(nodes, {graph.input: images}, keep=[chosen, *outputs])
        nodes.remove(chosen)
        for part in found.sites:
            keys = {edge.key for edge in part.edges}
            after = graph.run(
                nodes,
                {graph.input: images, chosen: before[chosen]},
                hook=lambda key, x: quantizers[key](x) if key in keys else x,  # noqa: B023
                keep=outputs,
            )
            noise = [(after[n].double() - before[n]).square().sum() / before[n].square().sum() for n in outputs]
            expected = -10 * math.log10(sum(noise) / 2) if sum(noise) else None
            assert part.effect.sqnr_db == (None if expected is None else pytest.approx(expected, abs=0.02)), part.name
    effects = {part.name: part.effect.sqnr_db for part in found.sites}
    assert [name for name, sqnr in effects.items() if sqnr is None] == ["score"]
    assert min(sqnr for sqnr in effects.values() if sqnr is not None) > 3
