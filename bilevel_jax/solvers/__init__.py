"""Published methods, each a named composition of an oracle, an estimator, optimisers and stages."""

from bilevel_jax.solvers.single_loop import default_opts, fsla, ma_soba, saba, soba, spaba, srba, storm_soba

__all__ = ["default_opts", "fsla", "ma_soba", "saba", "soba", "spaba", "srba", "storm_soba"]
