"""The variants of PyTorch libraries, in a process of their own: ``python torch_worker.py case.npz``, with numpy and torch only.

Its first line of output is a JSON pair: an object from names of variants to null, or to why they are left out, and the versions
of the libraries.  Then each line of input, a JSON pair of a name and a path or null, runs a variant and is answered by a line.
With a path the hypergradient is written there, and the answer is how far the memory of the process grew meanwhile, in MiB.
"""

import contextlib
import ctypes
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

TOLERANCE, MOST = 1e-6, 1000


def main(path: str, makers: Mapping[str, Callable] | None = None) -> None:
    """Answer until the input ends.  ``makers`` are variants by name, those of the kind of the case by default."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    found, why = variants(path, makers)
    print(json.dumps([why, versions()]), file=answers, flush=True)
    for line in sys.stdin:
        name, out = json.loads(line)
        if out is None:
            found[name]()
            print("null", file=answers, flush=True)
            continue
        before = _start_of_peak()
        gradient = found[name]()
        peak = _resident("VmHWM") - before
        np.save(out, gradient.detach().double().numpy())
        print(json.dumps(peak), file=answers, flush=True)


def versions() -> dict[str, str]:
    """Of the libraries that are there."""
    there = {}
    for name in ("torch", "torchopt", "higher", "learn2learn"):
        with contextlib.suppress(PackageNotFoundError):
            there[name] = version(name)
    return there


def variants(
    path: str, makers: Mapping[str, Callable] | None = None
) -> tuple[dict[str, Callable[[], Any]], dict[str, str | None]]:
    """Those that run here, by name, and for each name None or why it does not."""
    with np.load(path) as loaded:
        arrays = dict(loaded)
    kind = str(arrays.pop("kind"))
    makers = {"implicit": IMPLICIT, "unrolled": UNROLLED}[kind] if makers is None else makers
    found: dict[str, Callable[[], Any]] = {}
    why: dict[str, str | None] = {}
    for name, make in makers.items():
        try:
            torch: Any = importlib.import_module("torch")
            tensors = {key: torch.as_tensor(value) for key, value in arrays.items()}
            found[name], why[name] = make(torch, tensors), None
        except ImportError as error:
            why[name] = str(error)
    return found, why


def _start_of_peak() -> float:
    """The resident memory now, after what earlier calls freed is given back and the peak starts anew."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")
    return float("nan")


def _resident(field: str) -> float:
    """MiB of this process; nan where the system does not say (it does on Linux)."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))
    return float("nan")


def _logistic(torch: Any, t: dict[str, Any]) -> tuple[Callable, Callable]:
    """``g(z, x)`` and ``f(z)``."""

    def fit(z: Any, features: Any, labels: Any) -> Any:
        return torch.nn.functional.softplus(-labels * (features @ z)).mean()

    def g(z: Any, x: Any) -> Any:
        return fit(z, t["inner"], t["inner_labels"]) + 0.5 * (x.exp() * z**2).sum()

    return g, lambda z: fit(z, t["outer"], t["outer_labels"])


def _cg_by_hand(torch: Any, t: dict[str, Any]) -> Callable[[], Any]:
    """Conjugate gradients; a product is one pass back through the graph of the gradient, which is built once."""
    g, f = _logistic(torch, t)

    def run() -> Any:
        z, x = t["z"].clone().requires_grad_(), t["x"].clone().requires_grad_()
        (slope,) = torch.autograd.grad(g(z, x), z, create_graph=True)
        (fz,) = torch.autograd.grad(f(z), z)
        v, r = torch.zeros_like(fz), -fz
        p, rr, target = r, r @ r, TOLERANCE * fz.norm()
        for _ in range(MOST):
            if rr.sqrt() <= target:
                break
            (product,) = torch.autograd.grad(slope, z, p, retain_graph=True)
            rate = rr / (p @ product)
            v, r = v + rate * p, r - rate * product
            before, rr = rr, r @ r
            p = r + rr / before * p
        return torch.autograd.grad(slope, x, v)[0]

    return run


def _torchopt_implicit(solver: str, options: dict[str, Any], torch: Any, t: dict[str, Any]) -> Callable[[], Any]:
    torchopt: Any = importlib.import_module("torchopt")
    g, f = _logistic(torch, t)
    solve = getattr(torchopt.linear_solve, solver)(**options)

    @torchopt.diff.implicit.custom_root(torch.func.grad(g), argnums=1, solve=solve)
    def solution(z: Any, x: Any) -> Any:
        del x
        return z

    def run() -> Any:
        x = t["x"].clone().requires_grad_()
        return torch.autograd.grad(f(solution(t["z"].clone(), x)), x)[0]

    return run


def _losses(torch: Any, t: dict[str, Any]) -> tuple[Callable, Callable]:
    """``g(logits of, x)`` and ``f(logits of)``, of a function from features to logits."""

    def entropies(logits_of: Callable, level: str) -> Any:
        return torch.nn.functional.cross_entropy(logits_of(t[level]), t[f"{level}_labels"].long(), reduction="none")

    def g(logits_of: Callable, x: Any) -> Any:
        return (x.sigmoid() * entropies(logits_of, "inner")).mean()

    return g, lambda logits_of: entropies(logits_of, "outer").mean()


def _network(torch: Any, t: dict[str, Any]) -> Any:
    layers = torch.nn.Linear(*t["w1"].shape), torch.nn.Tanh(), torch.nn.Linear(*t["w2"].shape)
    for layer, i in ((layers[0], 1), (layers[2], 2)):
        layer.weight, layer.bias = (torch.nn.Parameter(a.clone()) for a in (t[f"w{i}"].T, t[f"b{i}"]))
    return torch.nn.Sequential(*layers)


def _loop_by_hand(torch: Any, t: dict[str, Any]) -> Callable[[], Any]:
    g, f = _losses(torch, t)
    rate = float(t["rate"])

    def logits(z: list, features: Any) -> Any:
        w1, b1, w2, b2 = z
        return torch.tanh(features @ w1 + b1) @ w2 + b2

    def run() -> Any:
        x, z = t["x"].clone().requires_grad_(), [t[name].clone().requires_grad_() for name in ("w1", "b1", "w2", "b2")]
        for _ in range(int(t["steps"])):
            slopes = torch.autograd.grad(g(partial(logits, z), x), z, create_graph=True)
            z = [a - rate * slope for a, slope in zip(z, slopes, strict=True)]
        return torch.autograd.grad(f(partial(logits, z)), x)[0]

    return run


def _higher(torch: Any, t: dict[str, Any]) -> Callable[[], Any]:
    higher: Any = importlib.import_module("higher")
    g, f = _losses(torch, t)

    def run() -> Any:
        x, network = t["x"].clone().requires_grad_(), _network(torch, t)
        with higher.innerloop_ctx(network, torch.optim.SGD(network.parameters(), lr=float(t["rate"]))) as (fast, opt):
            for _ in range(int(t["steps"])):
                opt.step(g(fast, x))
            return torch.autograd.grad(f(fast), x)[0]

    return run


def _meta_sgd(torch: Any, t: dict[str, Any]) -> Callable[[], Any]:
    torchopt: Any = importlib.import_module("torchopt")
    g, f = _losses(torch, t)

    def run() -> Any:
        x, network = t["x"].clone().requires_grad_(), _network(torch, t)
        opt = torchopt.MetaSGD(network, lr=float(t["rate"]))
        for _ in range(int(t["steps"])):
            opt.step(g(network, x))
        return torch.autograd.grad(f(network), x)[0]

    return run


_CG = {"rtol": TOLERANCE, "atol": 0.0, "maxiter": MOST}
IMPLICIT: dict[str, Callable[[Any, dict], Callable[[], Any]]] = {
    "torch cg by hand": _cg_by_hand,
    "torchopt cg": partial(_torchopt_implicit, "solve_cg", _CG),
    "torchopt default (normal equations)": partial(_torchopt_implicit, "solve_normal_cg", {}),
}
UNROLLED: dict[str, Callable[[Any, dict], Callable[[], Any]]] = {
    "torch loop by hand": _loop_by_hand,
    "higher": _higher,
    "torchopt": _meta_sgd,
}

if __name__ == "__main__":
    main(sys.argv[1])
