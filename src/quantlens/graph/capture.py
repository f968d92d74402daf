"""Model -> :class:`~quantlens.graph.graph.Graph`, through ``torch.export`` with a dynamic batch, attention opened.

``torch.export`` gives ATen operations that remember the module they came from; functionalisation without
decomposition keeps ``linear``, ``layer_norm`` and ``scaled_dot_product_attention`` whole and removes in-place writes
and dropout. What is left to do
here: name the parameters, fold what does not depend on the images (Swin's relative position bias), open fused attention
into q·kᵀ, scale, mask, softmax and ·v, and bring equivalent spellings to one.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from quantlens.ambient import isolated
from quantlens.errors import CaptureError
from quantlens.graph.graph import Graph, argument, op_name, put_tensor, replace_argument

aten = torch.ops.aten

SPELLINGS = {
    "aten.view.default": aten.reshape.default,
    "aten._unsafe_view.default": aten.reshape.default,
    "aten.bmm.default": aten.matmul.default,
    "aten.mm.default": aten.matmul.default,
}
IDENTITIES = {
    "aten.dropout.default",
    "aten.feature_dropout.default",
    "aten.alias.default",
    "aten.detach.default",
    "aten.detach_.default",
    "aten.lift_fresh_copy.default",
    "aten.contiguous.default",
    "aten.clone.default",
}
EFFECTS = ("aten._assert", "aten.sym_constrain", "aten._check", "profiler.")


@isolated
def capture(model: nn.Module, images: Tensor, *, share: bool = False) -> Graph:
    """Capture ``model`` in evaluation mode.

    images: [B, 3, H, W] float, an example of the input; its size is fixed, its batch is not (B = 1 is repeated to 2).
    Raises CaptureError when ``torch.export`` cannot trace the model or its output is not one tensor of logits.
    The model itself is left as it was; the graph holds copies of its tensors (``share``: the tensors themselves, at no
    memory, for a graph that is only read).
    """
    training = model.training
    model.eval()
    try:
        example = images[:2] if images.shape[0] >= 2 else images.expand(2, *images.shape[1:]).contiguous()
        batch = torch.export.Dim("batch", min=1, max=1 << 20)
        with torch.no_grad():
            program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},), strict=False)
            program = program.run_decompositions({})
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CaptureError(
            f"{type(model).__name__} cannot be captured by torch.export: {reason} "
            "(the model must take one image tensor [B, 3, H, W] and work for any batch size)"
        ) from error
    finally:
        model.train(training)
    graph = _flatten(program, share)
    _normalise(graph)
    _fold_constants(graph)
    _open_attention(graph)
    _matmul_by_constant_to_linear(graph)
    graph.fx.eliminate_dead_code()
    graph.fx.lint()
    graph.eval()
    return graph


def graph_of(model: Any) -> Graph:
    """The graph of a :class:`quantlens.models.Model`, captured at its first use and kept on the model: to
    be read, since it holds the model's own tensors; who wants to change it takes a
    :meth:`~quantlens.graph.graph.Graph.clone`."""
    if "graph" not in model.derived:
        size = model.preprocess.input_size
        model.derived["graph"] = capture(model.module, torch.zeros(2, *size, device=model.device), share=True)
    return model.derived["graph"]


def _flatten(program: Any, share: bool) -> Graph:
    """The exported program as a Graph: parameters become ``get_attr`` nodes under their ``state_dict`` names."""
    signature = program.graph_signature
    constants = signature.inputs_to_lifted_tensor_constants
    held_by = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **constants}
    tensors = {**program.constants, **program.state_dict}
    root, graph = nn.Module(), fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    batch = None
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in held_by:
            held = tensors[held_by[node.name]].detach()
            held = held.contiguous() if share else held.clone(memory_format=torch.contiguous_format)
            name = f"{'_lifted.' if node.name in constants else ''}{held_by[node.name]}"
            put_tensor(root, name, held)
            new = graph.get_attr(name)
        elif node.op == "placeholder" and batch is None:
            new, batch = graph.placeholder("images"), value.shape[0].node.expr
        elif node.op == "output":
            graph.output(mapping[_logits(node, signature)])
            break
        elif node.op == "call_function":
            new = graph.node_copy(node, lambda n: mapping[n])
        else:
            raise CaptureError(f"the model uses {node.op} {node.target!r}, which cannot be flattened into one graph")
        symbolic = isinstance(value, torch.SymInt | int)
        shape = (
            tuple(int(d) if isinstance(d, int) else None for d in value.shape) if isinstance(value, Tensor) else None
        )
        new.meta = {"module": _module(node), "shape": shape, "symbolic": symbolic}
        if isinstance(value, torch.SymInt):
            new.meta["is_batch"] = value.node.expr == batch
        mapping[node] = new
    return Graph(root, graph)


def _logits(output: fx.Node, signature: Any) -> fx.Node:
    nodes = {n.name: n for n in output.all_input_nodes}
    wanted = [nodes[n] for n in signature.user_outputs if n in nodes]
    found = wanted if len(wanted) == 1 else [n for n in wanted if len(n.meta["val"].shape) == 2]
    if len(found) != 1:
        raise CaptureError(
            f"the model returns {len(wanted)} tensors; wrap it in a module that returns the logits [B, classes]"
        )
    return found[0]


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return path.split("@")[0]


def _normalise(graph: Graph) -> None:
    """One spelling for each operation; identities and assertions gone; one node for the batch size."""
    for node in list(graph.fx.nodes):
        if node.op != "call_function":
            continue
        name = op_name(node)
        if name.startswith(EFFECTS):
            graph.fx.erase_node(node)
        elif name in IDENTITIES or (name == "aten.pad.default" and not any(node.args[1])):
            node.replace_all_uses_with(node.args[0])
            graph.fx.erase_node(node)
        elif name == "aten.addmm.default" and not node.kwargs:
            bias, *factors = node.args
            product = graph.insert(node, aten.matmul.default, tuple(factors), node.meta["shape"])
            node.target, node.args = aten.add.Tensor, (product, bias)
        elif name == "aten._softmax.default":
            node.target, node.args = aten.softmax.int, node.args[:2]
        elif name in SPELLINGS:
            node.target = SPELLINGS[name]
    sizes = [node for node in graph.fx.nodes if node.meta.get("is_batch")]
    if sizes:
        batch = graph.insert(graph.input.next, aten.sym_size.int, (graph.input, 0), ())
        batch.meta = {"module": "", "shape": None, "symbolic": True, "is_batch": True}
    for node in sizes:
        node.replace_all_uses_with(batch)
        graph.fx.erase_node(node)


def _fold_constants(graph: Graph) -> None:
    """Compute once what depends on parameters alone, and keep it under ``<parameter>_folded``-like names."""
    constant: dict[fx.Node, Any] = {}
    origin: dict[fx.Node, str] = {}
    for node in list(graph.fx.nodes):
        sources = node.all_input_nodes
        if node.op == "get_attr":
            constant[node], origin[node] = graph.tensor(str(node.target)), str(node.target)
        elif node.op != "call_function" or node.meta.get("symbolic") or not sources:
            continue
        elif all(s in constant for s in sources):
            args, kwargs = fx.map_arg((node.args, node.kwargs), constant.__getitem__)
            with torch.no_grad():
                constant[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            floats = [s for s in sources if isinstance(constant[s], Tensor) and constant[s].is_floating_point()]
            origin[node] = origin[(floats or sources)[0]]
    for node, value in constant.items():
        read = any(user not in constant for user in node.users)
        if node.op == "call_function" and read and isinstance(value, Tensor):
            name = graph.unused(f"{origin[node]}_folded", "")
            node.replace_all_uses_with(graph.insert_tensor(node, name, value.contiguous().clone()))
    graph.fx.eliminate_dead_code()


def _open_attention(graph: Graph) -> None:
    """Replace each fused attention by q·kᵀ → scale → mask → softmax → ·v."""
    for node in graph.fx.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        q, k, v = (argument(node, name) for name in ("query", "key", "value"))
        mask, scale = argument(node, "attn_mask"), argument(node, "scale")
        if argument(node, "is_causal") or argument(node, "enable_gqa"):
            raise CaptureError(f"{node.meta['module']}: causal or grouped-query attention is not supported")
        if scale is None:
            scale = float(q.meta["shape"][-1]) ** -0.5
        *lead, keys, size = k.meta["shape"]
        square = (*q.meta["shape"][:-1], keys)
        kt = graph.insert(node, aten.transpose.int, (k, -2, -1), (*lead, size, keys))
        logits = graph.insert(node, aten.matmul.default, (q, kt), square)
        logits = graph.insert(node, aten.mul.Tensor, (logits, float(scale)), square)
        if mask is not None:
            logits = graph.insert(node, aten.add.Tensor, (logits, _bias_of_mask(graph, node, mask)), square)
        probs = graph.insert(node, aten.softmax.int, (logits, -1), square)
        out = graph.insert(node, aten.matmul.default, (probs, v), (*square[:-1], v.meta["shape"][-1]))
        node.replace_all_uses_with(out)
        graph.fx.erase_node(node)


def _bias_of_mask(graph: Graph, node: fx.Node, mask: fx.Node) -> fx.Node:
    """What is added to the logits of an attention for its mask: the mask, or −∞ where a boolean one is False."""
    constant = graph.constant(mask)
    if constant is None:
        raise CaptureError(f"{node.meta['module']}: an attention mask computed from the images is not supported")
    if constant.dtype != torch.bool:
        return mask
    bias = torch.zeros(constant.shape, device=constant.device).masked_fill(~constant, float("-inf"))
    return graph.insert_tensor(node, f"{mask.target}_bias", bias)


def _matmul_by_constant_to_linear(graph: Graph) -> None:
    """``x @ W`` with a parameter W [in, out] is a linear layer with weight Wᵀ; a constant added to it is its bias."""
    for node in graph.fx.find_nodes(op="call_function", target=aten.matmul.default):
        weight = graph.constant(node.args[1])
        if weight is None or weight.dim() != 2:
            continue
        name = str(node.args[1].target)  # type: ignore[union-attr]
        stem = name.removesuffix("_folded").removesuffix(".weight")
        taken = f"{stem}.weight" in dict(graph.root.named_buffers())
        new = graph.insert_tensor(node, f"{name}_t" if taken else f"{stem}.weight", weight.t().contiguous())
        node.target, node.args = aten.linear.default, (node.args[0], new)
        users = list(node.users)
        if len(users) == 1 and op_name(users[0]) == "aten.add.Tensor" and not users[0].kwargs:
            other = [a for a in users[0].args if a is not node]
            bias = graph.constant(other[0]) if other else None
            if bias is not None and tuple(bias.shape) == (weight.shape[1],):
                replace_argument(node, "bias", other[0])
                node.prepend(other[0])  # the bias must be defined before the linear that uses it
                users[0].replace_all_uses_with(node)
                graph.fx.erase_node(users[0])
