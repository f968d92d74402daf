"""Modules and callables as they are: quantized by torchao or anything else, or of a kind that cannot be captured."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from quantlens.data import Preprocess
from quantlens.errors import QuantlensError
from quantlens.evaluation.foreign import Foreign
from quantlens.qmodel import Outputs
from quantlens.qmodel.plan import FP32

LINEAR = (torch.ops.aten.linear.default, torch.ops.aten.addmm.default)


class ForeignModule(Foreign):
    """An ``nn.Module`` or a callable, images float32 [B, 3, H, W] (normalised) -> logits [B, K], or a tuple or
    dictionary with such. The features are what its last linear layer reads, where one gives the logits."""

    def __init__(self, module: Any, *, output: str | None = None, features: str | None = None, **given: Any) -> None:
        if not callable(module):
            raise QuantlensError(
                f"evaluate takes a model of quantlens.load_model or quantlens.quantize, a file, an nn.Module or a "
                f"callable, not {type(module).__name__}"
            )
        self.module = module
        kind, own = "callable", None
        if isinstance(module, nn.Module):
            if given.get("preprocess") is None and getattr(given.get("reference"), "preprocess", None) is None:
                given["preprocess"] = own = _own_preprocess(module)
            tensors = list(_inner(module))
            kind = "pt2e" if isinstance(module, fx.GraphModule) else "torch"
            kind = "torchao" if any(_is_torchao(p) for p in module.parameters()) else kind
        own_name = getattr(module, "__name__", None) or type(module).__name__
        super().__init__(kind, own_name, output=output, features=features, **given)
        self._last: Any = None
        if own is not None:
            self.foreign["preprocess_from"] = "the module"
        if isinstance(module, nn.Module):
            self.size_mb = sum(tensor.nbytes for tensor in tensors) / 1e6
            self.num_parameters = self.num_parameters or sum(p.numel() for p in module.parameters()) or None
            self.foreign["sha256"] = _sha256(tensors)
            parameter = next((t for t in tensors if t.is_floating_point()), None)
            self.device = torch.device("cpu") if not tensors else tensors[0].device
            declared = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
            self._dtype = declared or (torch.float32 if parameter is None else parameter.dtype)
            if isinstance(module, fx.GraphModule):
                self._of_placeholder(module)
        else:
            self._dtype = torch.float32

    @classmethod
    def float(cls, model: Any) -> "ForeignModule":
        """A loaded float model that cannot be captured, under its own name as the FP32 model."""
        made = cls(model.module, preprocess=model.preprocess, task=getattr(model, "task", None), name=model.name)
        made.method, made.bits = "fp32", FP32
        made.checkpoint_sha256, made.class_names = model.checkpoint_sha256, model.class_names
        made.detection_head = getattr(model, "detection_head", None)
        return made

    def _of_placeholder(self, module: fx.GraphModule) -> None:
        """The type and the batch that an exported module was traced with."""
        value = next((n.meta.get("val") for n in module.graph.nodes if n.op == "placeholder" and "val" in n.meta), None)
        if isinstance(value, Tensor):
            self._dtype = value.dtype
            self.fixed_batch = int(value.shape[0]) if isinstance(value.shape[0], int) else None

    def to(self, *args: Any, **kwargs: Any) -> "ForeignModule":
        if isinstance(self.module, nn.Module):
            self.module.to(*args, **kwargs)
            tensors = list(_inner(self.module))
            self.device = tensors[0].device if tensors else self.device
        return self

    def named(self, images: Tensor) -> dict[str, Tensor]:
        with _evaluating(self.module):
            found = self.module(images.to(self.device, self._dtype))
        return _tensors(found)

    def learn(self, size: Any = None) -> None:
        known = self._read is not None
        super().learn(size)
        if known or self._read is None or self._read.task in ("features", "detect") or self._read.features is not None:
            return
        shape = tuple(size or (self.preprocess.input_size if self.preprocess else (3, 224, 224)))
        images = torch.linspace(-1, 1, shape[0] * shape[1] * shape[2]).view(1, *shape)
        images = images.expand(self.fixed_batch or 1, -1, -1, -1).contiguous()
        output = self._read.output
        with torch.inference_mode():
            self._last = _last_linear(self.module, lambda: self.named(images)[output])
        if self._last is not None:
            self.foreign["features"] = f"what {self._last} reads"

    def _of_batch(self, images: Tensor) -> Outputs:
        if self._last is None:
            return super()._of_batch(images)
        with _watching(self.module, self._last) as seen:
            found = super()._of_batch(images)
        features = torch.cat([inputs for inputs, _ in seen])[: len(images)].float() if seen else None
        return Outputs(found.logits, features)

    def classifier(self) -> tuple[Tensor, Tensor] | None:
        """Weight [K, D] and bias [K] of the layer that gives the logits, as floats; None where it is not known."""
        if self._last is None or isinstance(self._last, fx.Node):
            return None
        layer = self.module.get_submodule(self._last)
        weight, bias = (value() if callable(value) else value for value in (layer.weight, layer.bias))
        if hasattr(weight, "dequantize") and (weight.is_quantized or _is_torchao(weight)):
            weight = weight.dequantize()
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            return None
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        return weight.detach().float(), bias.detach().float()


# ---- the module as torch has it --------------------------------------------------------------------------------------


@contextmanager
def _evaluating(module: Any) -> Iterator[None]:
    """Without dropout and statistics of training inside, and afterwards as before."""
    parts = module.modules() if isinstance(module, nn.Module) else ()
    training = [part for part in parts if getattr(part, "training", False)]  # frozen TorchScript has no such thing
    for one in training:
        one.training = False
    try:
        yield
    finally:
        for one in training:
            one.training = True


def _own_preprocess(module: nn.Module) -> Preprocess | None:
    """Of a timm model, which carries it."""
    config = getattr(module, "pretrained_cfg", None)
    if not isinstance(config, dict) or not config.get("mean"):
        return None
    from timm.data import resolve_model_data_config

    return Preprocess.from_timm(resolve_model_data_config(module))


def _tensors(found: Any) -> dict[str, Tensor]:
    """The tensors and arrays that a module or a function returns, by key, or by place in a tuple."""
    if isinstance(found, Tensor | np.ndarray):
        return {"output": torch.as_tensor(found)}
    items: Any = enumerate(found) if isinstance(found, tuple | list) else ()
    if isinstance(found, Mapping):  # keys that are no names are a runtime's own: a place says as much
        items = ((key if isinstance(key, str) else place, value) for place, (key, value) in enumerate(found.items()))
    return {str(key): torch.as_tensor(value) for key, value in items if isinstance(value, Tensor | np.ndarray)}


def _is_torchao(tensor: Any) -> bool:
    return type(tensor).__module__.startswith("torchao")


def _inner(module: nn.Module) -> Iterator[Tensor]:
    """The plain tensors that a module is made of, each once: those inside tensor subclasses and packed layers too."""
    seen: set[int] = set()

    def plain(value: Any) -> Iterator[Tensor]:
        if isinstance(value, tuple | list):
            for part in value:
                yield from plain(part)
        elif isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            if hasattr(value, "__tensor_flatten__"):
                names, _ = value.__tensor_flatten__()
                yield from plain([getattr(value, name) for name in names])
            else:
                yield value.detach()

    yield from plain(list(module.state_dict(keep_vars=True).values()))
    yield from plain(list(module.buffers()))


def _sha256(tensors: list[Tensor]) -> str:
    """SHA-256 of the tensors one after the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.int_repr() if tensor.is_quantized else tensor
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---- the last linear layer -------------------------------------------------------------------------------------------


def _last_linear(module: Any, run: Callable[[], Tensor]) -> Any:
    """The name of the layer that gives the logits (a node, of an exported module); None where there is none."""
    if not isinstance(module, nn.Module):
        return None
    if isinstance(module, fx.GraphModule):
        return _last_node(module)
    layers = {name: m for name, m in module.named_modules() if hasattr(m, "out_features")}
    calls: list[tuple[str, Tensor]] = []

    def watch(name: str) -> Any:
        return lambda layer, inputs, output: calls.append((name, output)) if isinstance(output, Tensor) else None

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        logits = run()
    finally:
        for hook in hooks:
            hook.remove()
    return next((name for name, out in reversed(calls) if out.shape == logits.shape and torch.equal(out, logits)), None)


def _last_node(module: fx.GraphModule) -> fx.Node | None:
    """The linear layer before the output, past the rounding of its result."""
    node = next((n for n in reversed(module.graph.nodes) if n.op == "output"), None)
    for _ in range(8):
        inputs = node.all_input_nodes if node is not None else []
        if not inputs:
            return None
        node = inputs[0]
        if node.target in LINEAR:
            return node
    return None


@contextmanager
def _watching(module: Any, last: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What the last layer reads and gives, call by call."""
    seen: list[tuple[Tensor, Tensor]] = []
    if isinstance(last, fx.Node):
        place = last.args[1] if last.target is LINEAR[1] else last.args[0]
        forward = module.forward

        class Tap(fx.Interpreter):
            def run_node(self, node: fx.Node) -> Any:
                found = super().run_node(node)
                if node is place:
                    seen.append((found, found))
                return found

        module.forward = lambda *args: Tap(module).run(*args)
        try:
            yield seen
        finally:
            module.forward = forward
        return
    hook = module.get_submodule(last).register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
    try:
        yield seen
    finally:
        hook.remove()
