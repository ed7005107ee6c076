"""Whether the layers of a module feed one another in the order of their parameters, each unit by itself in between."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import fx, nn

__all__ = ["check_chain"]

_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_INPUT = "the inputs of the model"
_POINTWISE = frozenset(
    {
        "abs", "add", "alpha_dropout", "celu", "clamp", "contiguous", "div", "double", "dropout", "dropout1d",
        "dropout2d", "dropout3d", "elu", "exp", "feature_alpha_dropout", "flatten", "float", "gelu", "hardsigmoid",
        "hardswish", "hardtanh", "iadd", "imul", "isub", "leaky_relu", "logsigmoid", "mish", "mul", "neg", "pos",
        "pow", "relu", "relu6", "relu_", "reshape", "selu", "sigmoid", "silu", "softplus", "softsign", "sqrt",
        "square", "sub", "tanh", "tanhshrink", "to", "truediv", "type", "view",
    }
)  # fmt: skip
"""Functions and methods that keep units apart; what else they could do to them (a view) shows in shapes."""
_SPATIAL = frozenset(
    {
        "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
        "adaptive_max_pool2d", "adaptive_max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "interpolate",
        "max_pool1d", "max_pool2d", "max_pool3d",
    }
)  # fmt: skip
_SHAPES = frozenset({"dim", "getattr", "len", "ndim", "numel", "size"})
_POINTWISE_FILES = frozenset({"activation", "dropout", "flatten", "linear"})
_SPATIAL_FILES = frozenset({"padding", "pooling", "upsampling"})
_MIXING = (nn.GLU, nn.LogSoftmax, nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.Softmin, nn.Bilinear, nn.Linear)


def check_chain(module: nn.Module, names: Collection[str]) -> None:
    """Refuse a module unless its trained layers are one chain that ends in a single output layer.

    The layers' calls are followed by ``torch.fx`` through ``training_step``, ``forward``, or the ``forward`` of the
    part that holds the layers: the first of them that can be followed and calls every layer.

    Args:
        module: the user's module.
        names: the parameters that are cut, in their order.

    Raises:
        MisconfigurationException: names the layer that is in the way.

    Example:
        >>> from torch.nn import Linear, Sequential, Tanh
        >>> check_chain(Sequential(Linear(5, 8), Tanh(), Linear(8, 3)), ["0.weight", "0.bias", "2.weight", "2.bias"])
    """
    layers: dict[str, nn.Module] = {}
    for name in names:
        owner = name.rpartition(".")[0]
        layers[owner] = _layer(name, module.get_submodule(owner))
    if len(layers) < 2:
        return
    reason = "it has no forward"
    for root, function, prefix in _candidates(module, list(layers)):
        tracer = _Tracer(function, {id(part) for part in layers.values()})
        try:
            graph = tracer.trace(root)
        except Exception as error:  # a user's code may raise anything when it is given no tensors
            lines = str(error).strip().splitlines() or [""]
            reason = f"{type(error).__name__}: {lines[0]}"
            continue
        missing = _Chain(layers, prefix).follow(graph, root)
        if missing is None:
            return
        reason = f"layer {missing!r} is not called in {function}"
    raise MisconfigurationException(
        f"HeteroFL cannot see how the layers of {_class(module).__name__} feed one another: {reason}. Give the module "
        "a forward that torch.fx.symbolic_trace can follow, or put the layers into one nn.Sequential; or give every "
        "client width 1."
    )


def _layer(name: str, part: nn.Module) -> nn.Module:
    shape = f" of shape {tuple(part.get_parameter(name.rpartition('.')[2]).shape)}"
    plain = isinstance(part, _LINEAR) and any(type(part).forward is kind.forward for kind in _LINEAR)
    if not plain or not name.endswith((".weight", ".bias")):
        raise _refusal(name, f"belongs to no linear or convolution layer but to a {type(part).__name__}", shape)
    if getattr(part, "groups", 1) != 1:
        raise _refusal(name, f"belongs to a {type(part).__name__} with groups={part.groups}", shape)
    return part


def _class(module: nn.Module) -> type[nn.Module]:
    found: type[nn.Module] = getattr(module, "_user_class", type(module))
    return found


def _candidates(module: nn.Module, owners: list[str]) -> Iterator[tuple[nn.Module, str, str]]:
    """Yield what may be followed: a module, the name of its function, and the module's place in the whole."""
    probe = copy.copy(module)
    probe.__class__ = _class(module)  # the server's training_step is another one
    for name in ("log", "log_dict"):
        vars(probe)[name] = lambda *args, **kwargs: None
    if hasattr(probe, "training_step"):
        yield probe, "training_step", ""
    yield probe, "forward", ""
    common = owners[0].split(".")[:-1]
    for owner in owners[1:]:
        parts = owner.split(".")[:-1]
        same = [a == b for a, b in zip(common, parts, strict=False)] + [False]
        common = common[: same.index(False)]
    if common:
        place = ".".join(common)
        yield module.get_submodule(place), "forward", place + "."


class _Tracer(fx.Tracer):
    def __init__(self, function: str, layers: Collection[int]) -> None:
        super().__init__()
        self.traced_func_name = function
        self._layers = layers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        metric = type(m).__module__.startswith("torchmetrics")
        return metric or id(m) in self._layers or super().is_leaf_module(m, module_qualified_name)


class _Chain:
    """Follows the layers' outputs through a graph: a node is a mapping from where it comes from to what mixed units."""

    def __init__(self, layers: dict[str, nn.Module], prefix: str) -> None:
        self.layers = layers
        self.prefix = prefix
        self.order = list(layers)
        self.inputs: dict[str, dict[str, str | None]] = {}

    def follow(self, graph: fx.Graph, root: nn.Module) -> str | None:
        """Return a layer that is not called.

        Raises:
            MisconfigurationException: for layers that are no chain.
        """
        found: dict[fx.Node, dict[str, str | None]] = {}
        result: dict[str, str | None] = {}
        for node in graph.nodes:
            sources: dict[str, str | None] = {}
            for part in node.all_input_nodes:
                for origin, mixed in found[part].items():
                    sources[origin] = sources.get(origin) or mixed
            found[node] = self._passed(node, sources, root)
            if node.op == "output":
                result = sources
        missing = next((name for name in self.order if name not in self.inputs), None)
        if missing is None:
            self._check(result)
        return missing

    def _passed(self, node: fx.Node, sources: dict[str, str | None], root: nn.Module) -> dict[str, str | None]:
        if node.op == "placeholder":
            return {_INPUT: None}
        if node.op == "call_module":
            name = self.prefix + str(node.target)
            if name in self.layers:
                if name in self.inputs:
                    raise _refusal(f"{name}.weight", "is used twice in a step")
                self.inputs[name] = sources
                return {name: None}
            part = root.get_submodule(str(node.target))
            file = type(part).__module__.removeprefix("torch.nn.modules.")
            mixes = isinstance(part, _MIXING)
            pointwise, spatial = file in _POINTWISE_FILES and not mixes, file in _SPATIAL_FILES
            what = type(part).__name__
        elif node.op in ("call_function", "call_method"):
            what = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", node.name))
            if what in _SHAPES:
                return {}
            pointwise, spatial = what in _POINTWISE, what in _SPATIAL or (what == "mean" and _is_over_space(node))
        else:
            return sources
        return {
            origin: mixed if pointwise or (spatial and self._is_convolution(origin)) else mixed or what
            for origin, mixed in sources.items()
        }

    def _is_convolution(self, origin: str) -> bool:
        return origin == _INPUT or not isinstance(self.layers[origin], nn.Linear)

    def _check(self, result: dict[str, str | None]) -> None:
        for index, name in enumerate(self.order):
            sources = self.inputs[name]
            before, earlier = self.order[index - 1] if index else _INPUT, set(self.order[:index]) or {_INPUT}
            strange = next((origin for origin in sources if origin not in earlier), None)
            if strange is not None or before not in sources:
                came = strange or next(iter(sources), "nothing")
                raise _refusal(f"{name}.weight", f"gets its inputs from {came!r} and not from {before!r}")
            for origin, mixed in sources.items():
                if origin != _INPUT and mixed is not None:
                    why = f"follows {origin!r} behind {mixed}, which is not known to keep units apart"
                    raise _refusal(f"{name}.weight", why)
                if origin != _INPUT and _units(self.layers[origin]) != _units(self.layers[before]):
                    raise _refusal(f"{name}.weight", f"gets inputs from {origin!r} and {before!r} of other size")
        others = [name for name in self.order[:-1] if name in result]
        if others:
            why = f"gives outputs of the model, as {self.order[-1]!r} does"
            raise _refusal(f"{others[0]}.weight", why)


def _is_over_space(node: fx.Node) -> bool:
    over = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return all(isinstance(d, int) and d > 1 for d in (over if isinstance(over, list | tuple) else [over]))


def _units(layer: nn.Module) -> int:
    weight = layer.weight
    return int(weight.shape[0])  # type: ignore[index]


def _refusal(name: str, why: str, shape: str = "") -> MisconfigurationException:
    return MisconfigurationException(
        f"HeteroFL cannot cut {name!r}{shape}: it {why}. Declare linear and convolution layers in the order in which "
        "each feeds the next, a single output layer last, or give every client width 1."
    )
