"""Model -> :class:`~quantlens.graph.graph.Graph`, through ``torch.export`` with a dynamic batch, attention opened.

``torch.export`` gives ATen operations that remember the module they came from; functionalisation without
decomposition keeps ``linear``, ``layer_norm`` and ``scaled_dot_product_attention`` whole and removes in-place writes
and dropout. What is left to do
here: name the parameters, fold what does not depend on the images (Swin's relative position bias), open fused attention
into q·kᵀ, scale, mask, softmax and ·v, and bring equivalent spellings to one.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantlens.errors import CaptureError
from quantlens.graph.graph import Graph, op_name, put_tensor, replace_argument

aten = torch.ops.aten

SPELLINGS = {
    "aten.view.default": aten.reshape.default,
    "aten._unsafe_view.default": aten.reshape.default,
    "aten._softmax.default": aten.softmax.int,
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
    _eliminate_dead(graph)
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
    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted |= {k: f"_lifted.{v}" for k, v in getattr(signature, "inputs_to_lifted_tensor_constants", {}).items()}
    values: dict[str, Tensor] = {}
    for name, fqn in lifted.items():
        raw = fqn.removeprefix("_lifted.")
        value = program.state_dict.get(raw)
        values[name] = (program.constants[raw] if value is None else value).detach()
    root, graph = nn.Module(), fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    batch_symbol = None
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            if node.name in lifted:
                put_tensor(root, lifted[node.name], values[node.name] if share else values[node.name].clone())
                new = graph.get_attr(lifted[node.name])
            elif node.name in signature.user_inputs:
                if any(n.op == "placeholder" for n in graph.nodes):
                    raise CaptureError("the model takes more than one input; only one image tensor is supported")
                new = graph.placeholder("images")
                batch_symbol = value.shape[0].node.expr if isinstance(value.shape[0], torch.SymInt) else None
            else:
                raise CaptureError(f"the model's input {node.name!r} is neither a parameter nor the images")
        elif node.op == "output":
            graph.output(mapping[_logits(node, signature)])
            break
        else:
            if node.op != "call_function":
                raise CaptureError(
                    f"the model uses {node.op} {node.target!r}, which cannot be flattened into one graph"
                )
            new = graph.node_copy(node, lambda n: mapping[n])
        new.meta = {
            "module": _module(node),
            "shape": _shape(value),
            "symbolic": isinstance(value, torch.SymInt | int),
        }
        if isinstance(value, torch.SymInt):
            new.meta["is_batch"] = value.node.expr == batch_symbol
        mapping[node] = new
    return Graph(root, graph)


def _logits(output: fx.Node, signature: Any) -> fx.Node:
    names = list(signature.user_outputs)
    nodes = {n.name: n for n in output.all_input_nodes}
    wanted = [nodes[n] for n in names if n in nodes]
    if len(wanted) != 1:
        two_d = [n for n in wanted if len(n.meta["val"].shape) == 2]
        if len(two_d) != 1:
            raise CaptureError(
                f"the model returns {len(wanted)} tensors; wrap it in a module that returns the logits [B, classes]"
            )
        wanted = two_d
    return wanted[0]


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return path.split("@")[0]


def _shape(value: Any) -> tuple[int | None, ...] | None:
    if not isinstance(value, Tensor):
        return None
    return tuple(int(d) if isinstance(d, int) else None for d in value.shape)


def _normalise(graph: Graph) -> None:
    """One spelling for each operation; identities and assertions gone; one node for the batch size."""
    batch = None
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
            bias, x, weight = node.args
            with graph.fx.inserting_before(node):
                product = graph.fx.call_function(aten.matmul.default, (x, weight))
                product.meta = dict(node.meta)
            node.target, node.args = aten.add.Tensor, (product, bias)
        elif name == "aten._softmax.default":
            node.target, node.args = aten.softmax.int, node.args[:2]
        elif name in SPELLINGS:
            node.target = SPELLINGS[name]
        elif node.meta.get("is_batch"):
            if batch is None:
                with graph.fx.inserting_after(graph.input):
                    batch = graph.fx.call_function(aten.sym_size.int, (graph.input, 0))
                batch.meta = {"module": "", "shape": None, "symbolic": True, "is_batch": True}
            if node is not batch:
                node.replace_all_uses_with(batch)
                graph.fx.erase_node(node)


def _fold_constants(graph: Graph) -> None:
    """Compute once what depends on parameters alone, and keep it under ``<parameter>.folded``-like names."""
    constant: dict[fx.Node, Any] = {}
    origin: dict[fx.Node, str] = {}
    for node in list(graph.fx.nodes):
        if node.op == "get_attr":
            constant[node], origin[node] = graph.tensor(str(node.target)), str(node.target)
        elif node.op == "call_function" and not node.meta.get("symbolic"):
            sources = node.all_input_nodes
            if sources and all(s in constant for s in sources):
                lookup = constant
                args = fx.map_arg(node.args, lambda n, c=lookup: c[n])
                kwargs = fx.map_arg(node.kwargs, lambda n, c=lookup: c[n])
                with torch.no_grad():
                    constant[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                floats = [s for s in sources if isinstance(constant[s], Tensor) and constant[s].is_floating_point()]
                origin[node] = origin[(floats or sources)[0]]
    used: dict[str, int] = {}
    for node in list(graph.fx.nodes):
        if node not in constant or node.op == "get_attr" or not isinstance(constant[node], Tensor):
            continue
        if all(user in constant for user in node.users):
            continue
        stem = origin[node]
        used[stem] = used.get(stem, 0) + 1
        path, _, leaf = stem.rpartition(".")
        name = f"{path}.{leaf}_folded{used[stem] if used[stem] > 1 else ''}".lstrip(".")
        put_tensor(graph.root, name, constant[node].contiguous().clone())
        with graph.fx.inserting_before(node):
            new = graph.fx.get_attr(name)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
    _eliminate_dead(graph)


def _open_attention(graph: Graph) -> None:
    """Replace each fused attention by q·kᵀ → scale → mask → softmax → ·v."""
    for node in list(graph.fx.nodes):
        if op_name(node) != "aten.scaled_dot_product_attention.default":
            continue
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        call = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        q, k, v, mask = call["query"], call["key"], call["value"], call.get("attn_mask")
        if call.get("is_causal") or call.get("enable_gqa"):
            raise CaptureError(f"{node.meta['module']}: causal or grouped-query attention is not supported")
        scale = call.get("scale")
        if scale is None:
            scale = float(q.meta["shape"][-1]) ** -0.5
        lead, tokens, keys = q.meta["shape"][:-2], q.meta["shape"][-2], k.meta["shape"][-2]
        square = (*lead, tokens, keys)

        def add(target: Any, args: tuple, shape: tuple, at: fx.Node = node) -> fx.Node:
            with graph.fx.inserting_before(at):
                new = graph.fx.call_function(target, args)
            new.meta = {"module": at.meta["module"], "shape": shape, "symbolic": False}
            return new

        kt = add(aten.transpose.int, (k, -2, -1), (*k.meta["shape"][:-2], k.meta["shape"][-1], keys))
        logits = add(aten.matmul.default, (q, kt), square)
        logits = add(aten.mul.Tensor, (logits, float(scale)), square)
        if mask is not None:
            constant = graph.constant(mask)
            if constant is not None and constant.dtype == torch.bool:
                bias = torch.zeros(constant.shape, device=constant.device).masked_fill(~constant, float("-inf"))
                graph.set_tensor(f"{mask.target}_bias", bias)
                with graph.fx.inserting_before(node):
                    shape = mask.meta["shape"]
                    mask = graph.fx.get_attr(f"{mask.target}_bias")
                    mask.meta = {"module": node.meta["module"], "shape": shape, "symbolic": False}
            elif constant is None:
                raise CaptureError(
                    f"{node.meta['module']}: an attention mask computed from the images is not supported"
                )
            logits = add(aten.add.Tensor, (logits, mask), square)
        probs = add(aten.softmax.int, (logits, -1), square)
        out = add(aten.matmul.default, (probs, v), (*lead, tokens, v.meta["shape"][-1]))
        node.replace_all_uses_with(out)
        graph.fx.erase_node(node)


def _matmul_by_constant_to_linear(graph: Graph) -> None:
    """``x @ W`` with a parameter W [in, out] is a linear layer with weight Wᵀ; a constant added to it is its bias."""
    for node in list(graph.fx.nodes):
        if op_name(node) != "aten.matmul.default":
            continue
        weight = graph.constant(node.args[1])
        if weight is None or weight.dim() != 2:
            continue
        name = str(node.args[1].target)  # type: ignore[union-attr]
        stem = name.removesuffix("_folded").removesuffix(".weight")
        transposed = f"{stem}.weight" if not _exists(graph, f"{stem}.weight") else f"{name}_t"
        graph.set_tensor(transposed, weight.t().contiguous())
        with graph.fx.inserting_before(node):
            new = graph.fx.get_attr(transposed)
            new.meta = {"module": node.meta["module"], "shape": tuple(weight.t().shape), "symbolic": False}
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


def _exists(graph: Graph, name: str) -> bool:
    try:
        return isinstance(graph.tensor(name), Tensor)
    except AttributeError:
        return False


def _eliminate_dead(graph: Graph) -> None:
    for node in reversed(list(graph.fx.nodes)):
        if not node.users and node.op not in ("output", "placeholder"):
            graph.fx.erase_node(node)
    graph.invalidate()


SYMBOLIC_FUNCTIONS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "neg": operator.neg,
    "getitem": operator.getitem,
    "truediv": operator.truediv,
}
"""Plain Python functions that may stand in a graph (sizes computed from the batch); anything else is an ATen
operation."""
