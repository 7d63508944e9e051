"""The table of claims, each checked against saved results: ``python -m experiments.claims --help``."""
