"""Choosing an implementation: a backend either takes a call or says why not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from attnkit._core.errors import BackendUnavailable, OptionError
from attnkit._core.settings import settings

__all__ = ["Backend", "Explanation", "choose", "explain_choice", "only_when_named"]

C = TypeVar("C")


def _never(call: Any) -> list[str]:
    return []


@dataclass(frozen=True)
class Backend(Generic[C]):
    """One implementation of an operator.

    Attributes:
        name: what `backend=` calls it.
        run: takes the prepared call, returns the operator's outputs.
        refuses: the prepared call -> reasons why it cannot run it; none means yes.
        avoids: the prepared call -> reasons why "auto" passes it over although it could run the call.
    """

    name: str
    run: Callable[[C], Any]
    refuses: Callable[[C], list[str]]
    avoids: Callable[[C], list[str]] = _never


def only_when_named(call: Any) -> list[str]:
    """For `Backend.avoids`: "auto" never chooses it."""
    return ["only runs when named"]


@dataclass(frozen=True)
class Explanation:
    """What would run for a call, and why the others would not.

    Attributes:
        operator: the operator's name.
        chosen: the backend's name, or None when nothing can run.
        reason: one sentence.
        rejected: backend -> its reasons, in order of preference.
    """

    operator: str
    chosen: str | None
    reason: str
    rejected: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"{self.operator}: {self.chosen or 'nothing can run'} ({self.reason})"]
        lines += [f"  not {name}: {'; '.join(reasons)}" for name, reasons in self.rejected.items()]
        return "\n".join(lines)


def explain_choice(operator: str, backends: Sequence[Backend[C]], requested: str, call: C) -> Explanation:
    """Walk the backends in order of preference and record every refusal.

    Raises:
        OptionError: no backend has the requested name.
    """
    names = [backend.name for backend in backends]
    if requested != "auto" and requested not in names:
        raise OptionError(f"{operator} has no backend {requested!r}; choose one of {', '.join(['auto', *names])}")
    disabled = settings().disable
    rejected: dict[str, list[str]] = {}
    for backend in backends:
        if requested not in ("auto", backend.name):
            continue
        reasons = backend.refuses(call)
        if f"{operator}.{backend.name}" in disabled:
            reasons = [*reasons, "switched off by ATTNKIT_DISABLE"]
        if requested == "auto":
            reasons = [*reasons, *backend.avoids(call)]
        if not reasons:
            reason = "named by the caller" if requested != "auto" else "first in order of preference that can do the call"
            return Explanation(operator, backend.name, reason, rejected)
        rejected[backend.name] = reasons
    return Explanation(operator, None, "every allowed backend refuses", rejected)


def choose(operator: str, backends: Sequence[Backend[C]], requested: str, call: C) -> Backend[C]:
    """Return the backend that runs the call; a named one never falls back to another.

    Raises:
        OptionError: no backend has the requested name.
        BackendUnavailable: nothing allowed can run; the message lists every reason.
    """
    disabled = settings().disable
    for backend in backends:  # the hot path: no records, and the tracer of torch.compile sees plain code
        if requested not in ("auto", backend.name) or (disabled and f"{operator}.{backend.name}" in disabled):
            continue
        if not (backend.refuses(call) or (requested == "auto" and backend.avoids(call))):
            return backend
    explanation = explain_choice(operator, backends, requested, call)
    for backend in backends:
        if backend.name == explanation.chosen:
            return backend
    reasons = "; ".join(f"{name}: {', '.join(why)}" for name, why in explanation.rejected.items())
    raise BackendUnavailable(f"{operator} cannot run this call. {reasons}")
