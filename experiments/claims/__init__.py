"""The table of claims of four bodies of work, each checked against saved results: see ``python -m experiments.claims --help``."""
