"""Published methods, each a named composition of an oracle, an estimator, optimisers and stages."""

from bilevel_jax.solvers.accelerated import accbio, accbio_bg
from bilevel_jax.solvers.double_loop import aid_bio, amigo, ba, bsa, hoag, stocbio, ttsa
from bilevel_jax.solvers.finite_difference import fdehbo, hjfbio
from bilevel_jax.solvers.first_order import bome, bvfim, bvfsm, f2ba, f2sa, f2sa_p, meha, pbgd
from bilevel_jax.solvers.meta import anil, fomaml, imaml, maml, reptile
from bilevel_jax.solvers.recursive import mrbo, stable, sustain, vrbo
from bilevel_jax.solvers.single_loop import fsla, ma_soba, saba, sl_bamm, soba, spaba, srba, storm_soba
from bilevel_jax.solvers.steps import default_opts
from bilevel_jax.solvers.unrolled import bda, fo_itd_bio, iaptt, itd_bio, pzobo

__all__ = [
    "accbio",
    "accbio_bg",
    "aid_bio",
    "amigo",
    "anil",
    "ba",
    "bda",
    "bome",
    "bsa",
    "bvfim",
    "bvfsm",
    "default_opts",
    "f2ba",
    "f2sa",
    "f2sa_p",
    "fdehbo",
    "fo_itd_bio",
    "fomaml",
    "fsla",
    "hjfbio",
    "hoag",
    "iaptt",
    "imaml",
    "itd_bio",
    "ma_soba",
    "maml",
    "meha",
    "mrbo",
    "pbgd",
    "pzobo",
    "reptile",
    "saba",
    "sl_bamm",
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
