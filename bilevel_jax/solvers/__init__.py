"""Published methods, each a named composition of an oracle, an estimator, optimisers and stages."""

from bilevel_jax.solvers.accelerated import accbio, accbio_bg
from bilevel_jax.solvers.double_loop import aid_bio, amigo, ba, bsa, hoag, stocbio, ttsa
from bilevel_jax.solvers.recursive import mrbo, stable, sustain, vrbo
from bilevel_jax.solvers.single_loop import fsla, ma_soba, saba, soba, spaba, srba, storm_soba
from bilevel_jax.solvers.steps import default_opts
from bilevel_jax.solvers.unrolled import fo_itd_bio, itd_bio, pzobo

__all__ = [
    "accbio",
    "accbio_bg",
    "aid_bio",
    "amigo",
    "ba",
    "bsa",
    "default_opts",
    "fo_itd_bio",
    "fsla",
    "hoag",
    "itd_bio",
    "ma_soba",
    "mrbo",
    "pzobo",
    "saba",
    "soba",
    "spaba",
    "srba",
    "stable",
    "stocbio",
    "storm_soba",
    "sustain",
    "ttsa",
    "vrbo",
]
