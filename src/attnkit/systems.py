"""The thirty-one published systems: what each is, where it lives in attnkit, and how far it is."""

import importlib
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from attnkit._core.errors import AttnkitError, InputError

__all__ = ["BEGIN", "END", "STATUSES", "System", "in_readme", "load", "markdown", "summary", "validate"]

STATUSES = ("planned", "partial", "works", "measured")
BEGIN, END = "<!-- systems:begin -->", "<!-- systems:end -->"
_RESULTS = "benchmarks/results/"


@dataclass(frozen=True)
class System:
    """One system.

    Attributes:
        number: 1 to 31.
        title: short name, with what it is in brackets where the name does not say so.
        area: the part of attnkit it belongs to.
        functions: public names, fully qualified.
        arxiv: identifier of the paper.
        status: "planned", "partial", "works" or "measured".
        evidence: path of the result file or test that supports the status.
        note: what a partial system does today.
    """

    number: int
    title: str
    area: str
    functions: tuple[str, ...]
    arxiv: str
    status: str
    evidence: str = ""
    note: str = ""


def load() -> tuple[System, ...]:
    """All systems, by number."""
    data = tomllib.loads(resources.files("attnkit").joinpath("systems.toml").read_text("utf-8"))
    return tuple(System(**{**entry, "functions": tuple(entry["functions"])}) for entry in data["system"])


def validate(systems: Sequence[System]) -> None:
    """Check that no status claims more than exists.

    Raises:
        InputError: every false or malformed entry, one clause each.
    """
    problems = []
    if [system.number for system in systems] != list(range(1, len(systems) + 1)):
        problems.append("numbers are not 1, 2, 3, ...")
    for system in systems:
        problems += [f"system {system.number}: {problem}" for problem in _problems(system)]
    if problems:
        raise InputError(f"systems.toml is wrong: {'; '.join(problems)}")


def _problems(system: System) -> list[str]:
    if system.status not in STATUSES:
        return [f"status {system.status!r} is not one of {', '.join(STATUSES)}"]
    problems = []
    if system.status != "planned":
        absent = [name for name in system.functions if not _exists(name)]
        if system.status == "partial" and len(absent) == len(system.functions):
            problems.append("is partial, but none of its functions exists")
        if system.status != "partial" and absent:
            problems.append(f"{system.status}, but {', '.join(absent)} does not exist")
    if system.status == "measured" and not _has_result(system.evidence):
        problems.append(f"is measured, but its evidence {system.evidence!r} is no file under {_RESULTS}")
    return problems


def _exists(name: str) -> bool:
    """Whether a fully qualified name, of a module or of something in one, can be imported."""
    module, _, attribute = name.rpartition(".")
    for candidate in (name, module):
        try:
            found = importlib.import_module(candidate)
        except (ModuleNotFoundError, AttnkitError):
            continue
        return candidate == name or hasattr(found, attribute)
    return False


def _has_result(evidence: str) -> bool:
    if not evidence.startswith(_RESULTS):
        return False
    package = Path(str(resources.files("attnkit")))
    installed = package / "_results" / evidence.removeprefix(_RESULTS)
    return installed.is_file() or (package.parent.parent / evidence).is_file()


def summary(systems: Sequence[System]) -> str:
    """Count them by status: "31 systems: 2 partial, 29 planned"."""
    counts = Counter(system.status for system in systems)
    return f"{len(systems)} systems: " + ", ".join(f"{counts[name]} {name}" for name in reversed(STATUSES) if counts[name])


def markdown(systems: Sequence[System]) -> str:
    """The README's table between its markers."""
    lines = ["| # | system | in attnkit | paper | status |", "| ---: | --- | --- | --- | --- |"]
    for system in systems:
        paper = f"[{system.arxiv}](https://arxiv.org/abs/{system.arxiv})"
        status = f"{system.status}: {system.note}" if system.note else system.status
        if system.evidence:
            status = f"[{status}]({system.evidence})"
        lines.append(f"| {system.number} | {system.title} | `{system.area}` | {paper} | {status} |")
    table = "\n".join(lines)
    return f"{BEGIN}\n{table}\n{END}"


def in_readme(text: str) -> str:
    """Cut the generated part, markers included, out of a README.

    Raises:
        InputError: a marker is missing.
    """
    start, end = text.find(BEGIN), text.find(END)
    if start < 0 or end < start:
        raise InputError(f"README has no table of systems; put {BEGIN} and {END} where it belongs")
    return text[start : end + len(END)]
