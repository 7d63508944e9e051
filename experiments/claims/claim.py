"""A claim of a paper, how it is measured in saved results, and its verdict, which is computed."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from experiments.claims.saved import Saved

HOLDS, IN_PART, FAILS, UNCHECKABLE = "holds", "holds in part", "does not hold", "not checkable here"
VERDICTS = (HOLDS, IN_PART, FAILS, UNCHECKABLE)
ANSWERS = {True: "yes", False: "no", None: "undecided"}


class Found(NamedTuple):
    """What the saved results say."""

    ours: str  # made of computed numbers
    parts: Mapping[str, bool | None]  # the criterion: what has to be so, and whether it is; None: within the sampling error

    @property
    def verdict(self) -> str:
        """All parts: holds; some: holds in part; none: does not hold; all undecided: not checkable."""
        found = set(self.parts.values())
        if True in found:
            return HOLDS if found == {True} else IN_PART
        return FAILS if False in found else UNCHECKABLE

    @property
    def why(self) -> str:
        """The parts, with a yes or a no each, or undecided."""
        return "; ".join(f"{part}: {ANSWERS[so]}" for part, so in self.parts.items())


class Claim(NamedTuple):
    """One line of the table.  It is measured in saved results, or says why it cannot be."""

    text: str
    paper: str  # its short name in the references of the body
    where: str  # figure, theorem, section
    published: str = ""  # number, slope or order of the paper; empty where none is known
    recalled: bool = True  # whether the statement is from memory or second-hand, not read in the paper or its code
    runs: tuple[str, ...] = ()  # folders of saved results
    measure: Callable[[Saved], Found] | None = None
    reason: str = ""  # of a claim that is not checkable here


class Body(NamedTuple):
    """A body of work: one table."""

    title: str
    references: Mapping[str, str]  # short name of a paper: authors, title, venue, arXiv
    claims: tuple[Claim, ...]
    notes: tuple[str, ...] = ()  # what several lines have in common


def judge(claim: Claim, saved: Saved) -> tuple[str, str, str]:
    """What was found, the verdict, and why."""
    if claim.measure is None:
        return "", UNCHECKABLE, claim.reason
    found = claim.measure(saved)
    return found.ours, found.verdict, found.why
