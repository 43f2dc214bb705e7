"""docs/claims.md and docs/chunkwise.md say what the result files of claims say: every verdict, and the tables they quote."""

import re
import statistics
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from attnkit.lab.claims import CLAIMS
from attnkit.report import interval, markdown_table, read_envelope

ROOT = Path(__file__).parents[2]
RESULTS = {path.stem.removeprefix("claims-"): path for path in sorted((ROOT / "benchmarks" / "results").glob("claims-*.json"))}
WHOLE = (
    "mlstm-lm",
    "mlstm-lm-720",
    "mlstm-lm-50m",
    "mlstm-transfer",
    "entmax-lm",
    "scfa-lm",
    "scfa-lm-8k",
    "scfa-lm-8-buckets",
    "kv-needles",
    "kv-recall-cpu",
    "kv-recall",
)  # their tables are quoted as they are
SCHEMA = ROOT / "src" / "attnkit" / "report" / "schemas" / "attnkit.claim-1.json"


def part(name: str) -> str:
    """The table between two marks of its page."""
    file = "chunkwise.md" if name.startswith("mlstm") else "claims.md"
    page = (ROOT / "docs" / file).read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", page, re.DOTALL)
    assert found is not None
    return found[1].strip()


def document(name: str) -> dict[str, Any]:
    return read_envelope(RESULTS[name])


def verdicts() -> str:
    rows = [(f"`{name}`", document(name)["verdict"]["outcome"], document(name)["verdict"]["reason"]) for name in RESULTS]
    return markdown_table(["claim", "outcome", "what came out"], rows)


def tables() -> dict[str, str]:
    names = ("entmax-recall", "entmax-recall-rotary", "entmax-anneal")
    recall, rotary, anneal = (document(name)["tables"][0] for name in names)
    updates = document("entmax-iterations")["tables"][0]
    kept = [row for row in updates["rows"] if row[0] in ("512", "8,192", "65,536") and row[1] in ("0.1", "0.5", "1", "4")]
    whole = {name: document(name)["tables"][0] for name in WHOLE}
    return {
        "claims": verdicts(),
        "recall": markdown_table(recall["headers"], recall["rows"]),
        "rotary": markdown_table(rotary["headers"], rotary["rows"]),
        "iterations": markdown_table(updates["headers"], kept),
        "anneal": markdown_table(anneal["headers"], anneal["rows"]),
        **{name: markdown_table(table["headers"], table["rows"]) for name, table in whole.items()},
    }


@pytest.mark.parametrize("name", ["claims", "recall", "rotary", "iterations", "anneal", *WHOLE])
def test_the_page_quotes_the_files(name: str) -> None:
    assert part(name) == tables()[name]


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_those_of_the_claim(name: str) -> None:
    """A file was made by the full form, and its verdict, figures and tables follow from its rows today; one that is not whole
    is undecided."""
    import dataclasses
    import json

    from attnkit.report import plain

    found = document(name)
    jsonschema.validate(found, json.loads(SCHEMA.read_text("utf-8")))
    claim = CLAIMS[found["claim"]["name"]]
    assert found["complete"] or found["verdict"]["outcome"] == "undecided"
    assert not found["quick"]
    kinds = {field.name: field.default for field in dataclasses.fields(claim.settings)}
    values = {key: tuple(value) if isinstance(kinds[key], tuple) else value for key, value in found["settings"].items()}
    concluded = claim.conclude(claim.settings(**values), found["rows"])
    assert not found["complete"] or plain(dataclasses.asdict(concluded.verdict)) == found["verdict"]
    assert plain(list(concluded.tables)) == found["tables"]
    assert plain(list(concluded.figures)) == found["figures"]


def test_what_the_page_says_of_alpha_2() -> None:
    rows = [row for row in document("entmax-iterations")["rows"] if row["alpha"] == 2 and row["method"] != "bisection"]
    assert max(row["worst"] for row in rows if row["method"] == "Halley from a histogram") == 5
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    assert "up to five are left after the histogram" in page.replace("\n", " ")


def eight_seeds() -> str:
    """Gain of entmax over the longer lengths with its 95 % interval (Student's t, seven degrees of freedom)."""
    rows = [row for name in ("entmax-recall-rotary", "entmax-recall-seeds") for row in document(name)["rows"]]
    longer = [row for row in rows if row["positions"] == "first" and row["length"] > 64]
    gains = []
    for seed in range(8):
        means = [
            statistics.mean(row["accuracy"] for row in longer if (row["seed"], row["norm"]) == (seed, norm))
            for norm in ("softmax", "entmax")
        ]
        gains.append(means[1] - means[0])
    half = 2.365 * statistics.stdev(gains) / len(gains) ** 0.5
    return interval(statistics.mean(gains), statistics.mean(gains) - half, statistics.mean(gains) + half, 3)


def test_eight_seeds_are_quoted() -> None:
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    assert f"entmax is ahead by {eight_seeds()} in the mean" in page.replace("\n", " ")


def test_what_the_page_says_of_recall_at_2048_tokens() -> None:
    """Ahead in the mean, clearly with two seeds, level with the third."""
    rows = [row for row in document("entmax-recall")["rows"] if row["length"] == 2048]
    accuracy = {(row["norm"], row["seed"]): row["accuracy"] for row in rows}
    gains = sorted(accuracy["entmax", seed] - accuracy["softmax", seed] for seed in range(3))
    assert abs(gains[0]) < 0.002
    assert gains[1] > 0.005


def test_what_the_page_says_of_gates() -> None:
    """Per cent between the two gates, in the mean and with each seed, and at the validation before the last."""
    page = (ROOT / "docs" / "chunkwise.md").read_text(encoding="utf-8").replace("\n", " ").replace(" %", "%")
    found = document("mlstm-lm")
    ends = ("", ", least of the seeds", ", largest of the seeds")
    mean, least, largest = (f"{found['verdict']['numbers'][f'sigmoid over exp at 256{end}']:.1%}" for end in ends)
    assert f"{mean} higher than with exponential ones ({least} and {largest} with the two seeds)" in page
    before = {arm: [row["curve"][-2][1] for row in found["rows"] if row["arm"] == f"mlstm {arm}"] for arm in ("exp", "sigmoid")}
    gaps = [a / b - 1 for a, b in zip(before["sigmoid"], before["exp"], strict=True)]
    assert f"24 steps earlier {gaps[0]:.1%} and {gaps[1]:.1%}" in page
    apart, _, ratio = document("mlstm-transfer")["verdict"]["numbers"].values()
    assert f"at most {apart:.4f} apart" in page
    assert f"up to {ratio:.1f} times" in page
