"""A claim of a paper, how it is measured in saved results, and its verdict, which is computed."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from experiments.claims.saved import Saved

HOLDS, IN_PART, FAILS, UNCHECKABLE = "holds", "holds in part", "does not hold", "not checkable here"
VERDICTS = (HOLDS, IN_PART, FAILS, UNCHECKABLE)


class Found(NamedTuple):
    """What the saved results say."""

    ours: str  # made of computed numbers
    parts: Mapping[str, bool]  # the criterion: what has to be so, and whether it is
    undecided: str = ""  # why the numbers say neither yes nor no, where that is so

    @property
    def verdict(self) -> str:
        """All parts: holds; some: holds in part; none: does not hold."""
        if self.undecided:
            return UNCHECKABLE
        return HOLDS if all(self.parts.values()) else IN_PART if any(self.parts.values()) else FAILS

    @property
    def why(self) -> str:
        """The parts, with a yes or a no each."""
        return self.undecided or "; ".join(f"{part}: {'yes' if so else 'no'}" for part, so in self.parts.items())


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


def judge(claim: Claim, saved: Saved) -> tuple[Found, str]:
    """What was found, and the verdict."""
    if claim.measure is None:
        return Found("", {}, claim.reason), UNCHECKABLE
    found = claim.measure(saved)
    return found, found.verdict
