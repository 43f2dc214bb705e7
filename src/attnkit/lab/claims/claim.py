"""What a claim is: a paper's sentence, the small experiment that could refute it, and what came out."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from attnkit._core.checks import check_choice
from attnkit._core.errors import OptionError
from attnkit.lab.claims.place import Place

__all__ = ["OUTCOMES", "Cell", "Claim", "Conclusion", "Row", "Verdict"]

Row = dict[str, Any]
Outcome = Literal["holds", "holds in part", "does not hold", "undecided"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True)
class Cell:
    """A part of the work that is done or not; what is done is kept.

    Attributes:
        name: unique, in words ("seed 0, softmax").
        work: how much it is beside the others, in any unit; progress counts it.
        run: does it and returns its rows.
    """

    name: str
    work: int
    run: Callable[[Place], list[Row]]


@dataclass(frozen=True)
class Verdict:
    """What the rows say of the claim.

    Attributes:
        outcome: one of OUTCOMES; "undecided" where the experiment cannot tell, or is not finished.
        reason: a sentence with the numbers that decide.
        numbers: what is decided by, by name; None where a quantity is missing.
    Raises:
        OptionError: an unknown outcome.
    """

    outcome: Outcome
    reason: str
    numbers: Mapping[str, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("outcome", self.outcome, OUTCOMES)


@dataclass(frozen=True)
class Conclusion:
    """A verdict with its pictures.

    Attributes:
        verdict: see there.
        figures, tables: see `attnkit.lab.claims.figures`.
    """

    verdict: Verdict
    figures: Sequence[Mapping[str, Any]] = ()
    tables: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Claim:
    """One claim of one paper, and how it is tested here.

    Attributes:
        name: as typed.
        systems: numbers of the systems it belongs to.
        says: what the paper claims.
        source: the paper.
        protocol: what is done, in a line or two, and when the claim holds.
        minutes: the full form's time on `device`, about.
        device: "cpu" or "cuda": where the full form is meant to run.
        settings: a frozen dataclass with `seeds`; its defaults are the full form.
        quick: what the quick form changes; it shows that everything works, and decides nothing.
        cells: settings -> the work, what matters most first.
        conclude: (settings, rows of the cells that are done) -> what they say; must take any subset of the rows.
    """

    name: str
    systems: tuple[int, ...]
    says: str
    source: str
    protocol: str
    minutes: float
    device: str
    settings: type[Any]
    quick: Mapping[str, Any]
    cells: Callable[[Any], Sequence[Cell]]
    conclude: Callable[[Any, Sequence[Row]], Conclusion]

    def configure(
        self, *, quick: bool = False, seeds: Sequence[int] | None = None, changes: Mapping[str, str] | None = None
    ) -> Any:
        """Settings of a run.

        Args:
            quick: begin with the quick form instead of the full one.
            seeds: of everything random; None keeps the form's.
            changes: setting -> value as text; lists are written 1,2,3.
        Raises:
            OptionError: an unknown setting, or a value of the wrong kind.
        """
        known = dataclasses.asdict(self.settings())
        chosen: dict[str, Any] = dict(self.quick) if quick else {}
        for name, text in (changes or {}).items():
            if name not in known:
                raise OptionError(f"{self.name} has no setting {name!r}; it has {', '.join(known)}")
            chosen[name] = _parse(name, text, known[name])
        if seeds is not None:
            chosen["seeds"] = tuple(seeds)
        settings = self.settings(**chosen)
        if not settings.seeds:
            raise OptionError("seeds is empty; give at least one")
        return settings


def _parse(name: str, text: str, like: Any) -> Any:
    """Text -> a value of the kind of `like`: a number, a truth value, a string, or a tuple of these."""
    if isinstance(like, tuple):
        return tuple(_parse(name, item, like[0]) for item in text.split(","))
    if isinstance(like, bool):
        if text not in ("true", "false"):
            raise OptionError(f"{name}={text!r} is not allowed; write true or false")
        return text == "true"
    try:
        return type(like)(text)
    except ValueError:
        raise OptionError(f"{name}={text!r} is not allowed; write a value like {like!r}") from None
