"""The ground that all claims stand on: settings, cells that are kept, verdicts that say how far they are, files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from attnkit import report
from attnkit._core.errors import OptionError
from attnkit._core.events import Event
from attnkit.lab.claims import CLAIMS, Cell, Claim, Conclusion, Place, Verdict, run
from attnkit.lab.claims.figures import heat, lines, spread, table

calls: list[str] = []


@dataclass(frozen=True)
class Settings:
    lengths: tuple[int, ...] = (4, 8)
    rate: float = 0.5
    fails: str = ""
    strict: bool = False
    seeds: tuple[int, ...] = (0, 1)


def measure(settings: Settings, seed: int, length: int, place: Place) -> list[dict[str, Any]]:
    calls.append(f"{seed}/{length}")
    place.tell(0.5, "half way")
    if settings.fails == f"{seed}/{length}":
        raise KeyboardInterrupt
    return [{"seed": seed, "length": length, "value": seed + length * settings.rate}]


def cells(settings: Settings) -> list[Cell]:
    return [
        Cell(f"seed {seed}, {length} tokens", length, partial(measure, settings, seed, length))
        for seed in settings.seeds
        for length in settings.lengths
    ]


def conclude(settings: Settings, rows: Sequence[dict[str, Any]]) -> Conclusion:
    over = {"value": [(n, [row["value"] for row in rows if row["length"] == n]) for n in settings.lengths]}
    figures = [
        lines("Values", "tokens", "value", over, log_x=True, marks=[5]),
        heat("Map", "x", "y", [[0.123456, None], [1.0, 0.5]], quantity="share", columns=["a", "b"], rows=["c", "d"]),
    ]
    best = max(row["value"] for row in rows)
    verdict = Verdict("holds", f"The best is {best:g}.", {"best": best, "unknown": None})
    return Conclusion(verdict, figures, [table("All", ["seed", "value"], [[r["seed"], r["value"]] for r in rows], "Note.")])


TOY = Claim(
    name="toy", systems=(4, 5), says="toys grow", source="nobody (arXiv:0000.00000)", protocol="They are measured.",
    minutes=0.1,
    device="cpu", settings=Settings, quick={"lengths": (4,), "seeds": (0,)}, cells=cells, conclude=conclude,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    calls.clear()


def validated(document: Any) -> Any:
    text = resources.files("attnkit.report").joinpath("schemas", "attnkit.claim-1.json").read_text("utf-8")
    jsonschema.validate(document, json.loads(text))
    return document


def test_files_verdict_and_progress(tmp_path: Path) -> None:
    events: list[Event] = []
    document = validated(run(TOY, tmp_path, on_event=events.append))
    assert document["verdict"] == {"outcome": "holds", "reason": "The best is 5.", "numbers": {"best": 5.0, "unknown": None}}
    assert document["rows"][0] == {"cell": "seed 0, 4 tokens", "seed": 0, "length": 4, "value": 2.0}
    assert document["complete"]
    assert json.loads((tmp_path / "toy.json").read_text("utf-8")) == document
    done = [(event.done, event.total) for event in events]
    assert done == [(0, 24), (2, 24), (4, 24), (8, 24), (12, 24), (14, 24), (16, 24), (20, 24), (24, 24)]
    page = (tmp_path / "toy.html").read_text("utf-8")
    for text in ("Claim: toy", "toys grow", "Verdict: holds. The best is 5.", "arXiv:0000.00000", "lengths 4/8"):
        assert text in page
    assert page.count('<svg role="img"') == 2
    assert 'aria-label="Values. value: 4.50 at 8"' in page
    assert (tmp_path / "toy.png").read_bytes()[1:4] == b"PNG"


def test_what_is_done_is_kept(tmp_path: Path) -> None:
    broken = TOY.configure(changes={"fails": "1/4"})
    with pytest.raises(KeyboardInterrupt):
        run(TOY, tmp_path, settings=broken)
    so_far = validated(report.read_envelope(tmp_path / "toy.json"))
    assert so_far["finished"] == ["seed 0, 4 tokens", "seed 0, 8 tokens"]
    assert so_far["verdict"]["outcome"] == "undecided"
    assert so_far["verdict"]["reason"] == "2 of 4 cells are done; so far: holds. The best is 4."
    assert "2 of 4 cells are done" in (tmp_path / "toy.html").read_text("utf-8")
    with pytest.raises(OptionError, match="is an unfinished claim"):
        run(TOY, tmp_path, settings=broken)
    with pytest.raises(OptionError, match="cannot resume"):
        run(TOY, tmp_path, settings=TOY.configure(changes={"rate": "0.25"}), resume=True)
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(TOY, tmp_path, settings=broken, resume=True)
    assert calls == ["1/4"]


def test_some_cells_alone(tmp_path: Path) -> None:
    document = validated(run(TOY, tmp_path, only="seed 1"))
    assert calls == ["1/4", "1/8"]
    assert not document["complete"]
    assert document["verdict"]["reason"] == "2 of 4 cells are done; so far: holds. The best is 5."
    calls.clear()
    assert run(TOY, tmp_path, resume=True)["complete"]
    assert calls == ["0/4", "0/8"]
    with pytest.raises(OptionError, match=r"no cell of toy has 'seed 2' in its name; the first is 'seed 0, 4 tokens'"):
        run(TOY, tmp_path / "none", only="seed 2")


def test_trainings_of_another_run_are_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "toy-runs" / "seed-0").mkdir(parents=True)
    with pytest.raises(OptionError, match="holds trainings already"):
        run(TOY, tmp_path)
    assert calls == []


def test_the_quick_form_decides_nothing(tmp_path: Path) -> None:
    document = validated(run(TOY, tmp_path, quick=True))
    assert document["settings"]["lengths"] == [4]
    assert document["verdict"]["outcome"] == "undecided"
    assert document["verdict"]["reason"] == "The quick form is too small to decide; it gave: holds. The best is 2."


def test_settings_from_text() -> None:
    found = TOY.configure(quick=True, seeds=[7], changes={"lengths": "16,32", "rate": "2", "strict": "true", "fails": "x"})
    assert found == Settings(lengths=(16, 32), rate=2.0, fails="x", strict=True, seeds=(7,))
    assert TOY.configure() == Settings()
    for changes, message in (
        ({"size": "1"}, "toy has no setting 'size'; it has lengths, rate"),
        ({"lengths": "4,x"}, "lengths='x' is not allowed; write a value like 4"),
        ({"strict": "yes"}, "write true or false"),
    ):
        with pytest.raises(OptionError, match=message):
            TOY.configure(changes=changes)
    with pytest.raises(OptionError, match="seeds is empty"):
        TOY.configure(seeds=[])


def test_outcomes_are_few() -> None:
    with pytest.raises(OptionError, match="outcome"):
        Verdict("maybe", "")  # type: ignore[arg-type]


def test_figures_are_data() -> None:
    assert spread([1.0, 4.0, 1.0]) == {"mean": 2.0, "low": 1.0, "high": 4.0}
    drawn = lines("t", "x", "y", {"a": [(1, [2.0, 4.0]), (2, [])]})
    assert drawn["lines"] == [{"name": "a", "points": [{"x": 1, "y": 3.0, "low": 2.0, "high": 4.0}]}]
    assert heat("t", "x", "y", [[0.12345, None]], quantity="q", columns=["a", "b"], rows=["c"])["values"] == [[0.123, None]]


def test_the_catalogue() -> None:
    assert len(CLAIMS) >= 5
    for claim in CLAIMS.values():
        for quick in (False, True):
            settings = claim.configure(quick=quick)
            names = [cell.name for cell in claim.cells(settings)]
            assert names
            assert len(set(names)) == len(names)
            assert claim.conclude(settings, []).verdict.outcome == "undecided"
        assert set(claim.systems) <= set(range(1, 32))
        assert claim.device in ("cpu", "cuda")
        assert "It holds if" in claim.protocol or "it holds if" in claim.protocol, "a claim says beforehand when it holds"
        assert "arXiv:" in claim.source
