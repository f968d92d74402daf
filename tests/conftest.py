"""Small models that stand for the architectures, and the real data where it is present."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path[:0] = [
    str(HERE / folder) for folder in ("studies", "report", "graph", "")
]  # study_fakes, report_fakes, hf_models …
torch.set_num_threads(int(os.environ.get("QUANTLENS_TEST_THREADS", "1")))

LIMIT = "ONEDNN_MAX_CPU_ISA"
if LIMIT in os.environ:
    # torch settles on its limit at its first convolution; OpenVINO reads the same variable, and under a limit below the
    # processor's own gives outputs of no rows
    nn.functional.conv2d(torch.ones(2, 16, 8, 8), torch.ones(16, 16, 3, 3))
    del os.environ[LIMIT]

# the same examples in every run; HYPOTHESIS_PROFILE=random draws others
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("random")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

SHARED = Path(os.environ.get("QUANTLENS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
ARCHITECTURES = ("vit", "deit-distilled", "deit3", "swin", "torchvision", "plain")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real weights and images."""
    if not (SHARED / "weights").is_dir():
        pytest.skip(f"no real weights and images at {SHARED}")
    return SHARED


class PlainAttention(nn.Module):
    """Attention written out by hand, with separate projections and one without bias."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (
            nn.Linear(dim, dim),
            nn.Linear(dim, dim, bias=False),
            nn.Linear(dim, dim),
        )
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (
            p(x).view(b, n, self.heads, c // self.heads).transpose(1, 2) for p in (self.query, self.key, self.value)
        )
        weights = torch.softmax(q @ k.transpose(-1, -2) / (c // self.heads) ** 0.5, dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, c))


class PlainBlock(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.before, self.attention = nn.LayerNorm(dim), PlainAttention(dim, heads)
        self.after, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.down(nn.functional.gelu(self.up(self.after(x))))


class PlainViT(nn.Module):
    """A vision transformer that is not timm's: mean pooling, a projection written as ``x @ W``, no class token."""

    def __init__(self, dim: int = 32, depth: int = 2, classes: int = 10):
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 8, 8)
        self.position = nn.Parameter(torch.randn(1, 16, dim) * 0.1)
        self.layers = nn.ModuleList(PlainBlock(dim, 2) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


def make_model(kind: str, seed: int = 0) -> nn.Module:
    """A small model of an architecture whose norms, biases and layer scales are not trivial."""
    from timm.models import swin_transformer, vision_transformer
    from timm.models.deit import VisionTransformerDistilled

    size = {"img_size": 32, "num_classes": 10}
    vit = {**size, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "vit":
            model: nn.Module = vision_transformer.VisionTransformer(**vit)
        elif kind == "deit-distilled":
            model = VisionTransformerDistilled(**vit)
        elif kind == "deit3":
            model = vision_transformer.VisionTransformer(**vit, init_values=0.1, no_embed_class=True)
        elif kind == "swin":
            model = swin_transformer.SwinTransformer(
                **size, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4)
            )
        elif kind == "torchvision":
            from torchvision.models.vision_transformer import VisionTransformer

            model = VisionTransformer(
                image_size=32,
                patch_size=8,
                num_layers=2,
                num_heads=2,
                hidden_dim=32,
                mlp_dim=64,
                num_classes=10,
            )
        elif kind == "plain":
            model = PlainViT()
        else:
            raise ValueError(kind)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
            elif "pos" not in name:
                parameter.data = torch.randn_like(parameter) * parameter[0].numel() ** -0.5 * 1.5
    return model.eval().requires_grad_(False)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


def _told_in_full(module: nn.Module) -> bool:
    """Whether a fingerprint says all of a module: of tensors in a list and functions that remember values it does
    not."""
    own = ("_parameters", "_buffers", "_modules")
    kept = [v for part in module.modules() for k, v in vars(part).items() if k not in own and not isinstance(v, Tensor)]
    leaves = torch.utils._pytree.tree_leaves(kept)
    return not any(isinstance(v, Tensor | partial) or getattr(v, "__closure__", None) for v in leaves)


@pytest.fixture(scope="session", autouse=True)
def captured_once():
    """A capture takes seconds, and many tests make equal models: those share one, as the loads of a named model do."""
    from quantlens.errors import QuantlensWarning
    from quantlens.graph import reuse

    capturing = sys.modules["quantlens.graph.capture"]
    known: OrderedDict[tuple, object] = OrderedDict()

    def captured(owner, module, inputs, make):
        if not _told_in_full(module):
            return reuse.captured(owner, module, inputs, make)
        kinds = tuple(type(part) for part in module.modules())  # classes of one name may differ
        sizes = torch.utils._pytree.tree_map(lambda x: x.shape if isinstance(x, Tensor) else x, inputs)
        key = (reuse.fingerprint(module, str(sizes)), kinds)
        if key in known:
            known.move_to_end(key)
            return reuse.clothed(known[key], module)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            graph = make()
        for one in told:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        if not any(issubclass(one.category, QuantlensWarning) for one in told):  # that must be told again
            known[key] = reuse.bare(graph, module)
            while len(known) > 64:
                known.popitem(last=False)
        return graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capturing, "captured", captured)
        yield


@pytest.fixture
def captured_anew(captured_once, monkeypatch):
    """Every model is captured, also where an equal one was before."""
    monkeypatch.setattr(sys.modules["quantlens.graph.capture"], "captured", lambda owner, module, inputs, make: make())


@pytest.fixture(scope="session")
def small_models() -> dict[str, nn.Module]:
    return {kind: make_model(kind) for kind in ARCHITECTURES}


@contextlib.contextmanager
def left_as_it_was(models):
    """A model that many tests share is the same after all of them: a test that changes its graph fails the run, and
    not whichever test comes after it."""
    from quantlens.graph.capture import graph_of

    yield
    for name, model in models.items():
        if "graph" not in model.derived:  # nobody used it
            continue
        expected = model.module.state_dict()
        for key, value in graph_of(model).tensors().items():
            if key in expected:
                assert torch.equal(value, expected[key]), f"a test changed {key} of the shared model {name}"


@pytest.fixture(scope="session")
def loaded(small_models):
    """The small models as loaded models, by architecture. Capturing one takes seconds, and the graph stays with the
    model: whoever changes a network takes one of its own, not these."""
    import quantlens as ql

    models = {kind: ql.load_model(model, input_size=(3, 32, 32), name=kind) for kind, model in small_models.items()}
    with left_as_it_was(models):
        yield models


@pytest.fixture(scope="session")
def fresh(loaded, small_models):
    """architecture -> a model of which nothing but its graph is known."""
    import quantlens as ql
    from quantlens.graph.capture import graph_of

    def make(kind: str):
        model = ql.load_model(small_models[kind], input_size=(3, 32, 32), name=kind)
        model.derived["graph"] = graph_of(loaded[kind]).clone()
        return model

    return make


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The shipped model, which is trained: with 32 calibration images, its test images, their labels, and its logits on
    them."""
    import quantlens as ql
    from quantlens import zoo
    from quantlens.data import load_images, open_source

    entry, model = zoo.available()["digits-vit"], ql.load_model("digits-vit")

    def images(spec):
        return load_images(open_source(spec), entry.preprocess, cache_dir=tmp_path_factory.mktemp("cache"))

    test = images(entry.sources.id)
    with torch.inference_mode():
        expected = model(test.tensor())
    with left_as_it_was({"digits-vit": model}):
        yield {
            "model": model,
            "calibration": images(f"{entry.sources.calibration}?n=32&seed=0").tensor(),
            "images": test.tensor(),
            "labels": torch.tensor(test.labels),
            "expected": expected.clone(),
        }


@pytest.fixture
def network(architecture: str, small_models: dict[str, nn.Module]) -> nn.Module:
    return small_models[architecture]


@pytest.fixture(scope="session")
def pictures() -> Tensor:
    """[8, 3, 32, 32] smooth random images, so that neighbouring pixels are related as in photographs."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.randn(8, 3, 8, 8, generator=generator)
    return nn.functional.interpolate(coarse, size=32, mode="bicubic") + 0.1 * torch.randn(
        8, 3, 32, 32, generator=generator
    )
