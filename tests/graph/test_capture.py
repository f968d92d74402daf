from __future__ import annotations

import pytest
import torch
from torch import nn

from quantlens.errors import CaptureError
from quantlens.graph import Graph, capture, graph_of
from quantlens.graph.graph import op_name
from quantlens.graph.serialize import graph_from_dict, graph_to_dict
from quantlens.models import load_model


@pytest.fixture(scope="module")
def graphs(loaded, small_models, pictures) -> dict[str, Graph]:
    """Those of the loaded models, which many tests share; one is of a single image."""
    found = {kind: graph_of(model) for kind, model in loaded.items()}
    return found | {"vit": capture(small_models["vit"], pictures[:1])}


def test_same_function_at_any_batch_size(architecture, network, graphs, pictures):
    for batch in (1, 3, 8):
        torch.testing.assert_close(
            graphs[architecture](pictures[:batch]), network(pictures[:batch]), rtol=1e-5, atol=1e-5
        )


def test_attention_is_open(architecture, graphs):
    names = {op_name(n) for n in graphs[architecture].fx.nodes}
    assert "aten.scaled_dot_product_attention.default" not in names
    sites = graphs[architecture].sites
    depth = 4 if architecture == "swin" else 2
    for kind in ("scores", "probs", "context", "gelu"):
        assert len(sites.of_kind(kind)) == depth, kind
    assert len(sites.of_kind("add")) == 2 * depth
    assert len(sites.of_kind("conv")) == 1


def test_names_are_those_of_the_modules(graphs):
    sites = graphs["vit"].sites
    for name in (
        "patch_embed.proj",
        "blocks.1.attn.qkv",
        "blocks.1.attn.scores",
        "blocks.1.attn.probs",
        "blocks.1.norm1",
        "blocks.1.mlp.fc2",
        "blocks.1.add1",
        "blocks.1.add2",
        "blocks.1.mlp.act",
        "norm",
        "head",
    ):
        assert name in sites
    assert "layers.1.downsample.reduction" in graphs["swin"].sites
    assert "encoder.layers.encoder_layer_0.self_attention.in_proj" in graphs["torchvision"].sites
    assert "layers.0.attention.query" in graphs["plain"].sites


def test_heads_are_found(graphs):
    expected = {
        "vit": ["head"],
        "deit-distilled": ["head", "head_dist"],
        "swin": ["head.fc"],
        "torchvision": ["heads.head"],
    }
    for kind, names in expected.items():
        assert [s.name for s in graphs[kind].sites.head] == names


def test_probs_edges_hold_attention(graphs, pictures):
    graph = graphs["vit"]
    seen = {}

    def hook(key, value):
        seen[key] = value
        return value

    graph.run([n for n in graph.fx.nodes if n.op == "call_function"], {graph.input: pictures}, hook=hook)
    probs = seen["blocks.0.attn.probs.output"]
    assert probs.shape == (8, 2, 17, 17)
    torch.testing.assert_close(probs.sum(-1), torch.ones(8, 2, 17))
    # q·kᵀ, scaled, then softmax: recomputed from the operands that the scores edges carry
    logits = seen["blocks.0.attn.scores.q"] @ seen["blocks.0.attn.scores.k"]
    torch.testing.assert_close((logits * 16**-0.5).softmax(-1), probs)


def test_blocks_run_alone(architecture, graphs, pictures):
    graph = graphs[architecture]
    blocks = graph.sites.blocks
    assert len(blocks) == (4 if architecture == "swin" else 2)
    everything = [n for n in graph.fx.nodes if n.op == "call_function"]
    ends = [n for b in blocks for n in (b.source, b.result)]
    full = graph.run(everything, {graph.input: pictures}, keep=ends)
    for block in blocks:
        alone = graph.run(block.nodes, {graph.input: pictures, block.source: full[block.source]}, keep=[block.result])
        assert torch.equal(alone[block.result], full[block.result])


def test_parameters_keep_their_names(architecture, network, graphs):
    own = network.state_dict()
    kept = [name for name in graphs[architecture].tensors() if name in own]
    assert len(kept) >= 0.8 * len(list(network.named_parameters()))
    for name in kept:
        assert torch.equal(graphs[architecture].tensor(name), own[name])


def test_clone_is_independent(graphs, pictures):
    graph = graphs["vit"]
    before = graph(pictures)
    twin = graph.clone()
    twin.set_tensor("head.bias", twin.tensor("head.bias") + 1)
    torch.testing.assert_close(twin(pictures), before + 1)
    assert torch.equal(graph(pictures), before)


def test_plain_data_and_back(architecture, graphs, pictures):
    graph = graphs[architecture]
    twin = graph_from_dict(graph_to_dict(graph), graph.tensors())
    assert torch.equal(twin(pictures[:5]), graph(pictures[:5]))
    assert list(twin.sites.edges) == list(graph.sites.edges)
    assert [b.name for b in twin.sites.blocks] == [b.name for b in graph.sites.blocks]


@pytest.mark.parametrize(
    "target", ["os.system", "aten.from_file.default", "aten.add_.Tensor", "python.exec", "builtins.eval"]
)
def test_plain_data_refuses_what_is_not_a_pure_operation(graphs, target):
    from quantlens.errors import BadWeightsError

    nodes = graph_to_dict(graphs["vit"])
    next(n for n in nodes if n["op"] == "call_function")["target"] = target
    with pytest.raises(BadWeightsError):
        graph_from_dict(nodes, graphs["vit"].tensors())


def test_what_cannot_be_captured_says_so(pictures):
    class Branch(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3] if x.sum() > 0 else x.flatten(1)[:, 3:6]

    with pytest.raises(CaptureError, match=r"Branch cannot be captured"):
        capture(Branch(), pictures)


def test_the_model_is_left_alone(pictures):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.Dropout(0.5)).train()
    weight = model[1].weight.detach().clone()
    graph = capture(model, pictures)
    assert model.training
    graph.set_tensor("1.weight", graph.tensor("1.weight") * 0)
    assert torch.equal(model[1].weight, weight)


def test_no_two_sites_share_a_name() -> None:
    """`norm`, called twice, is numbered beside one that is called norm1; calls of a layer are told apart from layers of
    a list."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.norm1, self.norm2 = nn.LayerNorm(4), nn.LayerNorm(4), nn.LayerNorm(4)
            self.fc = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

        def forward(self, x):
            x = x.mean((2, 3))
            x = self.norm2(self.norm(self.norm1(self.norm(x))))
            return self.fc[1](self.fc[0](self.fc[1](x)))

    graph = capture(Twice().eval(), torch.randn(2, 4, 8, 8))
    norms, layers = ["norm3", "norm1", "norm4", "norm2"], ["fc.1.call1", "fc.0", "fc.1.call2"]
    assert [site.name for site in graph.sites] == norms + layers
    assert graph.sites.former == {"fc.11": "fc.1.call1", "fc.12": "fc.1.call2"}


def test_a_capture_copies_and_the_graph_of_a_model_takes_no_memory(small_models, pictures):
    module = small_models["vit"]
    captured = capture(module, pictures)
    assert not _addresses(captured.tensors().values()) & _addresses(module.parameters())
    model = load_model(module, input_size=tuple(pictures.shape[1:]))
    held = graph_of(model).tensors()
    assert _addresses(model.module.parameters()) <= _addresses(held.values())
    assert all(torch.equal(tensor, captured.tensor(name)) for name, tensor in held.items())


def _addresses(tensors) -> set[int]:
    return {tensor.data_ptr() for tensor in tensors}


class Relative(nn.Module):
    """Products with a parameter that is used as it is, too, and turned: its name is that of a tensor already."""

    def __init__(self):
        super().__init__()
        self.w, self.embed = nn.Parameter(torch.randn(8, 8)), nn.Linear(3, 8)

    def forward(self, x):
        x = self.embed(x.flatten(2).mT)
        return (x @ self.w + x @ self.w.mT + x * self.w[0] + x @ (2 * self.w)).mean(1)


def test_a_parameter_is_a_tensor_and_the_weight_of_layers():
    net = Relative().eval()
    images = torch.randn(3, 3, 4, 4)
    graph = capture(net, images)
    assert [op_name(n) for n in graph.fx.nodes].count("aten.linear.default") == 4
    torch.testing.assert_close(graph(images), net(images), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch knows no CUDA")
def test_batch_norm_on_a_gpu():
    """Exported without one: torch chooses BatchNorm's kernel there by the size of the batch, or of all its windows."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from quantlens.graph.exporting import Call

    with FakeTensorMode(shape_env=ShapeEnv()):
        image = torch.randn(2, 3, 16, 16, device="cuda")
        norm = nn.Sequential(nn.Conv2d(3, 4, 3, device="cuda"), nn.BatchNorm2d(4, device="cuda")).eval()
        program = Call(norm, (image,), {})._exported(strict=False)
    assert any("batch_norm" in str(node.target) for node in program.graph.nodes)
