"""The list of the thirty-one systems: complete, honest, and the same in the README."""

import dataclasses
import re
from pathlib import Path

import pytest

from attnkit import systems
from attnkit._core.errors import InputError

ROOT = Path(__file__).parent.parent


def changed(which: int, /, **fields: object) -> list[systems.System]:
    return [dataclasses.replace(system, **fields) if system.number == which else system for system in systems.load()]


def test_all_systems_are_listed_once_with_a_paper() -> None:
    listed = systems.load()
    assert [system.number for system in listed] == list(range(1, 32))
    assert all(re.fullmatch(r"\d{4}\.\d{5}", system.arxiv) for system in listed)
    for field in ("title", "arxiv"):
        values = [getattr(system, field) for system in listed]
        assert len(set(values)) == len(values)
    assert all(name.startswith("attnkit.") for system in listed for name in system.functions)


def test_no_status_claims_more_than_exists() -> None:
    systems.validate(systems.load())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"status": "done"}, "system 2: status 'done' is not one of planned, partial, works, measured"),
        ({"status": "partial", "functions": ("attnkit.ops.nope", "attnkit.nope.x")}, "system 2: is partial, but none of its"),
        (
            {"status": "works", "functions": ("attnkit.systems.load", "attnkit.systems.nope")},
            "system 2: works, but attnkit.systems.nope does not exist",
        ),
        (
            {"status": "measured", "functions": ("attnkit.systems.load",), "evidence": ""},
            "system 2: is measured, but its evidence '' is no file under benchmarks/results/",
        ),
        (
            {"status": "measured", "functions": ("attnkit.systems",), "evidence": "benchmarks/results/nope.json"},
            "is no file under benchmarks/results/",
        ),
        ({"status": "measured", "functions": ("attnkit.systems",), "evidence": "README.md"}, "is no file under"),
        ({"number": 40}, "numbers are not 1, 2, 3"),
    ],
)
def test_false_claims_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        systems.validate(changed(2, **fields))


def test_claims_that_hold_pass() -> None:
    systems.validate(changed(2, status="works", functions=("attnkit.systems.load", "attnkit.report")))
    systems.validate(changed(2, status="partial", functions=("attnkit.systems.load", "attnkit.nope")))


def test_evidence_is_found_beside_the_source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "src" / "attnkit"
    package.mkdir(parents=True)
    monkeypatch.setattr(systems.resources, "files", lambda name: package)
    claim = dataclasses.replace(
        systems.System(1, "t", "a", ("attnkit.systems",), "1", "measured"), evidence="benchmarks/results/x.json"
    )
    with pytest.raises(InputError, match="is measured, but"):
        systems.validate([claim])
    for place in (tmp_path / "benchmarks" / "results", package / "_results"):
        place.mkdir(parents=True)
        (place / "x.json").touch()
        systems.validate([claim])
        (place / "x.json").unlink()


def test_summary_counts_by_status() -> None:
    some = [
        dataclasses.replace(system, status=status)
        for system, status in zip(systems.load(), ("partial", "works", "planned"), strict=False)
    ]
    assert systems.summary(some) == "3 systems: 1 works, 1 partial, 1 planned"


def test_markdown_has_a_row_a_system() -> None:
    lines = systems.markdown(changed(3, status="measured", evidence="benchmarks/results/x.json")).splitlines()
    assert (lines[0], lines[-1]) == (systems.BEGIN, systems.END)
    assert len(lines) == 31 + 4
    assert len({line.count("|") for line in lines[1:-1]}) == 1
    assert lines[5].endswith("| [measured](benchmarks/results/x.json) |")


def test_readme_agrees() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count(systems.BEGIN) == readme.count(systems.END) == 1
    assert systems.in_readme(readme) == systems.markdown(systems.load()), (
        "run `attnkit systems --markdown` and paste its output"
    )


@pytest.mark.parametrize("text", ["", systems.BEGIN, f"{systems.END}{systems.BEGIN}"])
def test_a_readme_without_markers_is_an_error(text: str) -> None:
    with pytest.raises(InputError, match="README has no table of systems"):
        systems.in_readme(text)
