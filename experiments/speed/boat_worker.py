"""MEHA of boat-torch, in a process of its own: ``python boat_worker.py CASE``, with numpy, torch and boat-torch only.

CASE is a JSON object: the problem, its size, the settings, the accuracy and the limit of updates.  The first line of output is
a JSON object: versions, updates to that accuracy (null: not within the limit) and the end.  Then each line of input, ``true``
or ``false``, runs that many updates from the start, with or without the loss log that the library rewrites at every update,
and is answered by ``null``.
"""

import importlib
import json
import math
import sys
import tempfile
from importlib.metadata import version
from typing import Any

torch: Any = importlib.import_module("torch")
Problem: Any = importlib.import_module("boat_torch.boat_opt").Problem


class Point(torch.nn.Module):
    """A vector as a model."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.full((dim,), value))


def merely_convex_inner(feed: Any, upper: Point, lower: Point) -> Any:
    """``|z1|^2 / 2 - x z1``, z = (z1, z2)."""
    x, z = upper.value, lower.value
    return 0.5 * (z[: len(x)] ** 2).sum() - (x * z[: len(x)]).sum()


def merely_convex_outer(feed: Any, upper: Point, lower: Point) -> Any:
    """``|x - z2|^2 / 2 + |z1 - 1|^2 / 2``."""
    x, z = upper.value, lower.value
    return 0.5 * ((x - z[len(x) :]) ** 2).sum() + 0.5 * ((z[: len(x)] - 1) ** 2).sum()


def sine_inner(feed: Any, upper: Point, lower: Point) -> Any:
    """``sum sin(x + z - 2)``."""
    return torch.sin(upper.value + lower.value - 2).sum()


def sine_outer(feed: Any, upper: Point, lower: Point) -> Any:
    """``|x - 2|^2 + |z - 4|^2``."""
    return ((upper.value - 2) ** 2).sum() + ((lower.value - 4) ** 2).sum()


#: problem -> sizes of z over that of x, starts of x and z, and the solution of each entry.
PROBLEMS = {
    "merely_convex": (2, 0.01, 0.01, 1.0, 1.0),
    "sine": (1, -6.0, 0.0, 3 * math.pi / 4, 3 * math.pi / 4 + 2),
}


def solver(case: dict[str, Any], log: bool) -> tuple[Any, Point, Point]:
    """The library's problem at its start, and the two models."""
    ratio, x0, z0, _, _ = PROBLEMS[case["problem"]]
    upper, lower = Point(case["dim"], x0), Point(ratio * case["dim"], z0)
    settings = {
        "fo_op": "MESO",
        "gm_op": None,
        "na_op": None,
        "lower_level_model": lower,
        "upper_level_model": upper,
        "lower_level_var": list(lower.parameters()),
        "upper_level_var": list(upper.parameters()),
        "lower_level_opt": torch.optim.SGD(lower.parameters(), lr=case["beta"]),
        "upper_level_opt": torch.optim.SGD(upper.parameters(), lr=case["alpha"]),
        "MESO": {"eta": case["eta"], "gamma_1": 1 / case["gamma"], "c0": case["c_low"], "y_hat_lr": 0.1},
        "lower_iters": 1,
        "device": "cpu",
        "fo_ol_batch_input": False,
        "return_grad": False,
        "loss_log_path": tempfile.mkdtemp() + "/losses.json",
    }
    names = {f"{level}_level_loss": {"function": f"__main__.{case['problem']}_{part}"} for level, part in LEVELS}
    problem = Problem(settings, names)
    problem.build_ll_solver()
    problem.build_ul_solver()
    if not log:
        problem.save_losses = lambda **losses: None
    return problem, upper, lower


LEVELS = (("lower", "inner"), ("upper", "outer"))


def error(case: dict[str, Any], upper: Point, lower: Point) -> float:
    """The largest relative error of an entry of x and z."""
    _, _, _, x, z = PROBLEMS[case["problem"]]
    return max(float((p.value.detach() / value - 1).abs().max()) for p, value in ((upper, x), (lower, z)))


def main(text: str) -> None:
    """Answer until the input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # the library prints
    case = json.loads(text)
    torch.set_num_threads(1)  # the vectors are short
    problem, upper, lower = solver(case, log=False)
    count = None
    for update in range(case["limit"]):
        problem.run_iter({}, {}, update)
        if not error(case, upper, lower) > case["accuracy"]:
            count = update + 1
            break
    end = [float(p.value.detach().mean()) for p in (upper, lower)]
    found = {"updates": count, "end": end, "versions": {name: version(name) for name in ("torch", "boat-torch")}}
    print(json.dumps(found), file=answers, flush=True)
    for line in sys.stdin:
        problem, _, _ = solver(case, log=json.loads(line))
        for update in range(count or case["limit"]):
            problem.run_iter({}, {}, update)
        print("null", file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
