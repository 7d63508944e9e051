"""Every transformation of optax, and what it can move.  ``python -m tests.optimiser_table`` writes docs/optimisers.md."""

import inspect
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from bilevel_jax.optimisers import begin

PAGE = Path(__file__).parent.parent / "docs" / "optimisers.md"
RATE = 0.05


def labels(params: Any) -> Any:
    return jax.tree.map(lambda leaf: "all", params)


def every(params: Any) -> Any:
    return jax.tree.map(lambda leaf: True, params)


def none(params: Any) -> Any:
    return jax.tree.map(lambda leaf: False, params)


def matrices(params: Any) -> Any:
    return jax.tree.map(lambda leaf: optax.contrib.MuonDimensionNumbers(), params)


SGD = optax.sgd(RATE)
#: Positional and keyword arguments of those that need more than a learning rate.
ARGUMENTS: dict[str, tuple[tuple, dict]] = {
    "MultiSteps": ((SGD, 2), {}),
    "adaptive_grad_clip": ((0.1,), {}),
    "add_noise": ((0.01, 0.5, 0), {}),
    "apply_if_finite": ((SGD, 3), {}),
    "chain": ((optax.clip(1.0), SGD), {}),
    "clip": ((1.0,), {}),
    "clip_by_block_rms": ((1.0,), {}),
    "clip_by_global_norm": ((1.0,), {}),
    "conditionally_mask": ((SGD, lambda step, **others: step > 0), {}),
    "conditionally_transform": ((SGD, lambda step, **others: step > 0), {}),
    "contrib.differentially_private_aggregate": ((1.0, 0.1, 0), {}),
    "contrib.dpsgd": ((RATE, 1.0, 0.1, 0), {}),
    "contrib.mechanize": ((SGD,), {}),
    "contrib.sam": ((SGD, optax.sgd(0.01)), {}),
    "contrib.scale_by_muon": ((), {"weight_dimension_numbers": matrices}),
    "contrib.schedule_free": ((SGD, RATE), {}),
    "contrib.split_real_and_imaginary": ((SGD,), {}),
    "ema": ((0.9,), {}),
    "flatten": ((SGD,), {}),
    "freeze": ((none,), {}),
    "inject_hyperparams": ((optax.adam,), {}),
    "inject_stateful_hyperparams": ((optax.adam,), {}),
    "lookahead": ((SGD, 3, 0.5), {}),
    "masked": ((SGD, every), {}),
    "measure_with_ema": ((optax.tree.norm, 0.9), {}),
    "monitor": (({"norm": optax.tree.norm},), {}),
    "multi_transform": (({"all": SGD}, labels), {}),
    "named_chain": ((("clip", optax.clip(1.0)), ("sgd", SGD)), {}),
    "noisy_sgd": ((RATE,), {"key": 0}),
    "partition": (({"all": SGD}, labels), {}),
    "scale": ((-RATE,), {}),
    "scale_by_backtracking_linesearch": ((10,), {}),
    "scale_by_schedule": ((lambda count: -RATE / (count + 1),), {}),
    "scale_by_zoom_linesearch": ((10,), {}),
    "selective_transform": ((SGD,), {"freeze_mask": none}),
    "snapshot": (("norm", optax.tree.norm), {}),
    "stateless": ((lambda updates, params: jax.tree.map(lambda u: -RATE * u, updates),), {}),
    "stateless_with_tree_map": ((lambda update, param: -RATE * update,), {}),
    "trace": ((0.9,), {}),
    "with_extra_args_support": ((SGD,), {}),
}
#: Public functions without a return annotation, and classes with `init` and `update`, that make no transformation.
OTHERS = {
    "WrappedSchedule",
    "bias_correction",
    "contrib.schedule_free_eval_params",
    "matrix_inverse_pth_root",
    "sigmoid_binary_cross_entropy",
    "update_infinity_moment",
    "update_moment",
    "update_moment_per_elem_norm",
}

SEARCH = "decreases the loss of the draw, which is not the mean over the data"
CONSTANT = "unrolled, the step sizes that it finds are constants"
INJECTED = "works where what it makes works; here `adam`, whose `eps_root=1e-8` makes the unrolled derivative finite"
MEMORY = "its memory mixes the samples of fresh draws: for full batches, or steps that share a draw"
AVERAGED = "the variable is the point y; `optax.contrib.schedule_free_eval_params` gives the average, from the state"
SIGN = "only signs of directions count: an unrolled path has the derivative 0 in x through its steps"
FIRST_ZERO = "NaN if its first direction is 0: start at another point, or put `optax.zero_nans` after it"
NOTES = {
    "MultiSteps": "moves the variable at every k-th step",
    "add_noise": "draws from its own state, not from the batch",
    "contrib.dadapt_adamw": FIRST_ZERO,
    "contrib.hutchinson_estimator_diag_hessian": "a part of `sophia`: its updates are a diagonal of the Hessian",
    "contrib.prodigy": FIRST_ZERO,
    "contrib.sam": "every second iterate is the perturbed point; with `opaque_mode=True`, with a known loss",
    "contrib.scale_by_muon": "moves matrices, in a tree with `weight_dimension_numbers`; `muon` moves other leaves by adam",
    "contrib.schedule_free": AVERAGED,
    "contrib.schedule_free_adamw": AVERAGED,
    "contrib.schedule_free_sgd": AVERAGED,
    "lbfgs": f"{SEARCH}; {MEMORY}; with `linesearch=None` as `scale_by_lbfgs`",
    "contrib.momo": "`lower_bound` is that of the loss of a draw",
    "contrib.momo_adam": "`lower_bound` is that of the loss of a draw",
    "lion": SIGN,
    "measure_with_ema": "a part of `monitor`",
    "noisy_sgd": "draws from its own state, not from the batch",
    "polyak_sgd": "`f_min` is that of the loss of a draw",
    "rprop": SIGN,
    "inject_hyperparams": INJECTED,
    "inject_stateful_hyperparams": INJECTED,
    "scale_by_backtracking_linesearch": f"{SEARCH}; {CONSTANT}",
    "scale_by_lbfgs": MEMORY,
    "scale_by_lion": SIGN,
    "scale_by_polyak": "`f_min` is that of the loss of a draw",
    "scale_by_rprop": SIGN,
    "scale_by_sign": SIGN,
    "scale_by_zoom_linesearch": SEARCH,
    "sign_sgd": SIGN,
    "signum": SIGN,
}


#: Those of which an unrolled path has the derivative NaN where an entry of a direction is 0.
UNDIFFERENTIABLE_AT_0 = {
    *("adafactor", "adam", "adamw", "amsgrad", "inject_hyperparams", "inject_stateful_hyperparams", "lamb"),
    *("optimistic_adam", "optimistic_adam_v2", "scale_by_adam", "scale_by_adan", "scale_by_amsgrad"),
    "scale_by_factored_rms",
    *("contrib.ademamix", "contrib.adopt", "contrib.dadapt_adamw", "contrib.galore", "contrib.madgrad"),
    *("contrib.momo_adam", "contrib.muon", "contrib.prodigy", "contrib.scale_by_ademamix", "contrib.scale_by_adopt"),
    *("contrib.scale_by_galore", "contrib.scale_by_madgrad", "contrib.scale_by_simplified_ademamix"),
    *("contrib.schedule_free_adamw", "contrib.simplified_ademamix"),
}
#: Those of which it is NaN everywhere.
UNDIFFERENTIABLE = {"radam", "scale_by_lbfgs", "scale_by_radam", "contrib.mechanize"}


def modules() -> dict[str, Any]:
    """Of the prefix of a name."""
    return {"": optax, "contrib.": optax.contrib}


def public() -> dict[str, Any]:
    """The public callables of optax and optax.contrib that make a transformation, or whose annotation does not say."""
    found = {}
    for prefix, module in modules().items():
        for name, value in vars(module).items():
            if name.startswith("_") or not callable(value):
                continue
            if inspect.isclass(value):
                makes = hasattr(value, "init") and hasattr(value, "update") and not issubclass(value, tuple)
                makes = makes and not getattr(value, "_is_protocol", False)
            elif inspect.isfunction(value):
                annotation = inspect.signature(value).return_annotation
                makes = annotation is inspect.Signature.empty or "GradientTransformation" in str(annotation)
            else:
                makes = False
            if makes and prefix + name not in OTHERS:
                found[prefix + name] = value
    return found


def root_of(name: str) -> str | None:
    """The parameter of a transformation that is added under its square root."""
    return next((p for p in inspect.signature(public()[name]).parameters if p.endswith("eps_root")), None)


def make(name: str, **keywords: Any) -> Any:
    """A transformation by its name, with small rates."""
    function = public()[name]
    positional, others = ARGUMENTS.get(name, ((), {}))
    keywords |= others
    if name not in ARGUMENTS and "learning_rate" in inspect.signature(function).parameters:
        keywords |= {"learning_rate": RATE}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of optax, on arguments that will be called otherwise
        opt = function(*positional, **keywords)
        return opt(learning_rate=RATE) if name.startswith("inject") else opt


def point(name: str, dtype: Any = jnp.float32) -> dict[str, Any]:
    """A matrix and, where a transformation can move it, a vector, without zeros."""
    matrix = {"w": jnp.asarray([[1.0, 2.0], [3.0, -1.0], [2.0, 5.0]], dtype)}
    return matrix if name == "contrib.scale_by_muon" else matrix | {"b": jnp.asarray([0.5, -2.0], dtype)}


class Verdict(NamedTuple):
    """What a transformation can move; "" where it works, else the reason of the refusal."""

    known: str  # z where the loss is known
    unrolled: str  # z along a path that is differentiated, whose loss is known
    unknown: str  # any variable whose loss is not known


@cache
def verdict(name: str) -> Verdict:
    def reason(loss: bool, backward: bool) -> str:
        value = point(name)
        try:
            begin("opts.inner", "inner", make(name), value, value, loss=loss, backward=backward)
        except ValueError as error:
            return re.search(r"that (.*?), expected", str(error))[1]  # type: ignore[index]
        return ""

    return Verdict(reason(True, False), reason(True, True), reason(False, False))


def row(name: str) -> str:
    known, unrolled, unknown = verdict(name)

    def cell(reason: str) -> str:
        return f"refused: {reason}" if reason else "with a known loss" if unknown else "works"

    along = cell(unrolled) + ", but with the derivative NaN where a direction is 0" * (name in UNDIFFERENTIABLE_AT_0)
    along += ", but with the derivative NaN" * (name in UNDIFFERENTIABLE)
    other = f"refused: {unknown}" if unknown else "works"
    notes = [NOTES[name]] if name in NOTES else []
    if root_of(name) and name in UNDIFFERENTIABLE_AT_0:
        notes.append(f"`{root_of(name)}=1e-8` makes the unrolled derivative finite")
    cells = (f"`optax.{name}`", cell(known), along, other, other, "; ".join(notes))
    return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"


TEXT = """# Optimisers

Any optax transformation can be given as the optimiser of z, v or x, if it needs only a direction. Some need the value of a loss
as well, such as line searches. They work where a stage knows a loss whose gradient is the direction:

- in `solve_inner`, for z;
- in `descend`, for z, with the oracles `implicit`, `finite_difference` and `aid`, and the estimator `plain` (the default);
- in `unroll`, `hypergrad.iterative` and the stages of tasks, for the inner steps, unless these are scaled or of first order.

Everywhere else such a transformation is refused in `init`, with the name of the argument. So are those that change the
structure or the shapes of the variable or of their state, and, in a path that is differentiated, those that have no derivative
in reverse mode. The loss is that of the current draw. The evaluations of a line search are not counted in the cost of a stage.

```python
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import Levels, Problem, Vars, run, samplers, solvers

problem = Problem(
    inner=lambda z, x, rows: 0.5 * ((z - x) ** 2 * rows).sum(-1),
    outer=lambda z, x, rows: 0.5 * ((z - rows) ** 2).sum(-1),
)
data = Levels(inner=jnp.array([[1.0, 10.0, 100.0]]), outer=jnp.array([[1.0, 2.0, 3.0]]))
solver = solvers.aid_bio(problem, Vars(inner=optax.lbfgs(), outer=optax.sgd(0.5)), inner_steps=5)
start = Vars(inner=jnp.zeros(3), outer=jnp.zeros(3))
carry, _ = jax.jit(lambda key: run(solver, samplers.full(), start, data, key, steps=30))(jax.random.key(0))
assert int(carry.result) == 0
assert jnp.allclose(carry.state.vars.outer, data.outer[0], atol=1e-3)

try:
    run(solvers.soba(problem, Vars(*3 * [optax.polyak_sgd()])), samplers.full(), start, data, jax.random.key(0), steps=1)
except ValueError as error:
    assert str(error).startswith("opts.aux: got an optimiser of vars.aux that needs the value of a loss")
```

The optimiser of `solve_inner` starts anew in every update, that of `descend` does not (unless `restart=True`). Extra arguments
go only to transformations that accept them. The state of an optimiser keeps the dtypes that its `init` gave it, and a variable
keeps its own.

## All transformations

`python -m tests.optimiser_table` writes this table from what the library does with optax {version}; a test compares the two.
*Unrolled* means a path of inner steps that is differentiated. "With a known loss" means: in the places listed above.

| transformation | z | z, unrolled | v | x | note |
|---|---|---|---|---|---|
"""


def page() -> str:
    names = sorted(public(), key=lambda name: (name.startswith("contrib."), name.lower()))
    return TEXT.replace("{version}", optax.__version__) + "".join(row(name) + "\n" for name in names)


if __name__ == "__main__":
    PAGE.write_text(page())
