"""MAML by PyTorch libraries, in a process of their own: ``python maml_worker.py case.npz``, served by `torch_worker`.

A gradient is a vector: of every layer the bias, then the kernel in the layout of jax.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any


def network(torch: Any, t: dict[str, Any]) -> Any:
    """The module of the case, at its parameters."""
    nn, layers = torch.nn, []
    count = sum(name.startswith("kernel") for name in t)
    for i in range(count):
        kernel, bias = t[f"kernel{i}"], t[f"bias{i}"]
        if kernel.ndim == 4:
            layer, weight = nn.Conv2d(kernel.shape[2], kernel.shape[3], 3, stride=2, padding=1), kernel.permute(3, 2, 0, 1)
        else:
            layer, weight = nn.Linear(*kernel.shape), kernel.T
            if i == _first_linear(t):
                layers.append(nn.Flatten())
                weight = _channels_first(t, weight)
        layer.weight, layer.bias = nn.Parameter(weight.contiguous().clone()), nn.Parameter(bias.clone())
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _first_linear(t: dict[str, Any]) -> int:
    return next(i for i in range(len(t)) if t[f"kernel{i}"].ndim == 2)


def _maps(t: dict[str, Any]) -> tuple[int, int]:
    """Channels and pixels of what the first linear layer is given."""
    first = _first_linear(t)
    channels = t[f"kernel{first - 1}"].shape[3] if first else 1
    return channels, t[f"kernel{first}"].shape[0] // channels


def _channels_first(t: dict[str, Any], weight: Any) -> Any:
    channels, pixels = _maps(t)
    return weight.reshape(-1, pixels, channels).transpose(1, 2).reshape(weight.shape)


def as_vector(torch: Any, t: dict[str, Any], gradients: Any) -> Any:
    """Of gradients in the order of the module's parameters (weight, bias of every layer)."""
    parts, gradients = [], list(gradients)
    for i, (weight, bias) in enumerate(zip(gradients[::2], gradients[1::2], strict=True)):
        if weight.ndim == 4:
            kernel = weight.permute(2, 3, 1, 0)
        else:
            channels, pixels = _maps(t)
            if i == _first_linear(t):
                weight = weight.reshape(-1, channels, pixels).transpose(1, 2).reshape(weight.shape)
            kernel = weight.T
        parts += [bias.reshape(-1), kernel.reshape(-1)]
    return torch.cat(parts)


def tasks_of(t: dict[str, Any]) -> list[Any]:
    """Images with their channels first, and labels, of support and query, stacked over tasks."""
    return [
        part for level in ("inner", "outer") for part in (t[level].movedim(-1, -3).contiguous(), t[f"{level}_labels"].long())
    ]


def _func_vmap(torch: Any, t: dict[str, Any]) -> Callable[[], Any]:
    module, data, rate = network(torch, t), tasks_of(t), float(t["rate"])
    params = {name: p.detach() for name, p in module.named_parameters()}

    def loss(params: Any, images: Any, labels: Any) -> Any:
        return torch.nn.functional.cross_entropy(torch.func.functional_call(module, params, (images,)), labels)

    def one(params: Any, images: Any, labels: Any, others: Any, other_labels: Any) -> Any:
        for _ in range(int(t["steps"])):
            way = torch.func.grad(loss)(params, images, labels)
            params = {name: p - rate * way[name] for name, p in params.items()}
        return loss(params, others, other_labels)

    def mean(params: Any) -> Any:
        return torch.func.vmap(one, in_dims=(None, 0, 0, 0, 0))(params, *data).mean()

    return lambda: as_vector(torch, t, torch.func.grad(mean)(params).values())


def _by_hand(torch: Any, t: dict[str, Any]) -> Callable[[], Any]:
    module, data, rate = network(torch, t), tasks_of(t), float(t["rate"])
    start, names = list(module.parameters()), [name for name, _ in module.named_parameters()]

    def loss(z: Any, images: Any, labels: Any) -> Any:
        made = torch.func.functional_call(module, dict(zip(names, z, strict=True)), (images,))
        return torch.nn.functional.cross_entropy(made, labels)

    def one(images: Any, labels: Any, others: Any, other_labels: Any) -> Any:
        z = start
        for _ in range(int(t["steps"])):
            way = torch.autograd.grad(loss(z, images, labels), z, create_graph=True)
            z = [a - rate * b for a, b in zip(z, way, strict=True)]
        return torch.autograd.grad(loss(z, others, other_labels), start)

    return lambda: as_vector(torch, t, _mean(one, data))


def _mean(one: Callable[..., Any], data: list[Any]) -> list[Any]:
    """Of the gradients of the tasks, one after the other."""
    total = None
    for task in zip(*data, strict=True):
        found = one(*task)
        total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
    return [part / len(data[0]) for part in total or ()]


def _higher(torch: Any, t: dict[str, Any]) -> Callable[[], Any]:
    higher: Any = importlib.import_module("higher")
    module, data, entropy = network(torch, t), tasks_of(t), torch.nn.functional.cross_entropy
    opt = torch.optim.SGD(module.parameters(), lr=float(t["rate"]))

    def one(images: Any, labels: Any, others: Any, other_labels: Any) -> Any:
        with higher.innerloop_ctx(module, opt, copy_initial_weights=False) as (fast, inner):
            for _ in range(int(t["steps"])):
                inner.step(entropy(fast(images), labels))
            return torch.autograd.grad(entropy(fast(others), other_labels), list(module.parameters()))

    return lambda: as_vector(torch, t, _mean(one, data))


def _learn2learn(torch: Any, t: dict[str, Any]) -> Callable[[], Any]:
    maml = _maml_of_learn2learn()(network(torch, t), lr=float(t["rate"]), first_order=False)
    data, entropy = tasks_of(t), torch.nn.functional.cross_entropy

    def one(images: Any, labels: Any, others: Any, other_labels: Any) -> Any:
        learner = maml.clone()
        for _ in range(int(t["steps"])):
            learner.adapt(entropy(learner(images), labels))
        return torch.autograd.grad(entropy(learner(others), other_labels), list(maml.parameters()))

    return lambda: as_vector(torch, t, _mean(one, data))


def _maml_of_learn2learn() -> Any:
    """Its MAML without its data package, whose compiled part does not build on every Python: then its source is enough."""
    if (spec := importlib.util.find_spec("learn2learn")) is None:
        raise ImportError("No module named 'learn2learn'")
    for name, folder in (("learn2learn", ""), ("learn2learn.algorithms", "/algorithms")):
        package: Any = types.ModuleType(name)
        package.__path__ = [f"{(spec.submodule_search_locations or [''])[0]}{folder}"]
        sys.modules[name] = package
    return importlib.import_module("learn2learn.algorithms.maml").MAML


def _torchopt(torch: Any, t: dict[str, Any]) -> Callable[[], Any]:
    torchopt: Any = importlib.import_module("torchopt")
    module, data, entropy = network(torch, t), tasks_of(t), torch.nn.functional.cross_entropy
    opt, start = torchopt.MetaSGD(module, lr=float(t["rate"])), list(module.parameters())

    def one(images: Any, labels: Any, others: Any, other_labels: Any) -> Any:
        before = [torchopt.extract_state_dict(part, by="reference") for part in (module, opt)]
        for _ in range(int(t["steps"])):
            opt.step(entropy(module(images), labels))
        found = torch.autograd.grad(entropy(module(others), other_labels), start)
        for part, state in zip((module, opt), before, strict=True):
            torchopt.recover_state_dict(part, state)
        return found

    return lambda: as_vector(torch, t, _mean(one, data))


VARIANTS: dict[str, Callable[[Any, dict], Callable[[], Any]]] = {
    "torch.func vmap": _func_vmap,
    "torch loop by hand": _by_hand,
    "higher": _higher,
    "learn2learn": _learn2learn,
    "torchopt": _torchopt,
}

if __name__ == "__main__":
    importlib.import_module("torch_worker").main(sys.argv[1], VARIANTS)  # its neighbour: the folder of a script is on the path
