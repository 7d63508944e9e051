"""Data on many machines: agents that speak to their neighbours, clients of a server, workers that need not wait."""

from bilevel_jax.distributed.fednest import fednest
from bilevel_jax.distributed.gossip import complete, d_soba, gossip, metropolis, per_agent, ring, spectral_gap

__all__ = ["complete", "d_soba", "fednest", "gossip", "metropolis", "per_agent", "ring", "spectral_gap"]
