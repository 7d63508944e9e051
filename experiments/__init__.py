"""Experiments: data, problems and figures of the papers, built on bilevel_jax."""
