"""The documentation runs, says what the code says, and leaves no public name out."""

import doctest
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest

import attnkit
from attnkit.cli import main
from attnkit.cli.doctor import TESTED_TRANSFORMERS
from attnkit.report import write_json
from report_examples import compare_envelope, race_envelope

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SOURCE = ROOT / "src" / "attnkit"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
NAMESPACES = [
    "assets",
    "errors",
    "inference",
    "kv",
    "lab.bench",
    "lab.claims",
    "lab.compare",
    "lab.numerics",
    "lab.numerics.callback",
    "lab.numerics.conformance",
    "lab.numerics.weight_study",
    "lab.tune",
    "models",
    "modules",
    "ops",
    "report",
    "systems",
    "training",
]
MODULES = [
    ".".join(("attnkit", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    for path in sorted(SOURCE.rglob("*.py"))
    if re.search(r">>> (?!.*\+SKIP)", path.read_text(encoding="utf-8"))
]


def script(name: str) -> ModuleType:
    """Import a script of docs/ from its file."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def public_names() -> set[str]:
    names = set()
    for namespace in NAMESPACES:
        module = attnkit.errors if namespace == "errors" else importlib.import_module(f"attnkit.{namespace}")
        names |= {f"attnkit.{namespace}.{name}" for name in module.__all__ if callable(getattr(module, name))}
    return names


def test_there_are_doctests() -> None:
    assert {"attnkit.ops", "attnkit.ops.merge", "attnkit.ops.attention.api", "attnkit.inference.policy"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize(
    "name",
    [
        "start",
        "attention",
        "attention-core",
        "entmax",
        "chunkwise",
        "models",
        "inference",
        "kv",
        "compare",
        "numerics",
        "conformance",
        "race",
        "claims",
        "training",
    ],
)
def test_code_in_pages(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`python` blocks run, `pycon` blocks give what they show; the blocks of a page share their names."""
    if name == "attention-core":
        pytest.importorskip("triton")
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": f"docs.{name}"}
    runner, parser = doctest.DocTestRunner(), doctest.DocTestParser()
    blocks = list(re.finditer(r"^```(python|pycon)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert blocks
    for block in blocks:
        line = text[: block.start()].count("\n") + 1
        if block[1] == "python":
            exec(compile("\n" * line + block[2], f"{name}.md", "exec"), names)
        else:
            test = parser.get_doctest(block[2], names, f"{name}.md", f"{name}.md", line)
            assert test.examples
            runner.run(test, clear_globs=False)
            names = test.globs
    assert runner.summarize().failed == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", ["cli.md", "operators.md", "presses.md", "systems.md", "results.md"])
def test_generated_pages_are_fresh(name: str) -> None:
    committed = (DOCS / name).read_text(encoding="utf-8")
    assert committed == script("generate").pages()[name], "stale; run: python docs/generate.py"


def test_figures_are_fresh(tmp_path: Path) -> None:
    """The same labels and as many shapes; coordinates may differ in the last digit between matplotlibs."""
    figures = script("figures")
    figures.write(tmp_path)

    def content(path: Path) -> tuple[list[str], int]:
        svg = path.read_text(encoding="utf-8")
        return re.findall(r"<text[^>]*>([^<]*)</text>", svg), svg.count("<path ")

    for name in figures.FIGURES:
        labels, shapes = content(DOCS / "figures" / name)
        assert labels
        assert (labels, shapes) == content(tmp_path / name), "stale; run: python docs/figures.py"


def _commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^(?:\$ |  )(attnkit [a-z].*)$|`(attnkit [a-z][^`]*)`", text, re.MULTILINE):
            yield page.name, (match[1] or match[2]).split("#")[0]


def test_commands_in_pages_exist() -> None:
    """Every `attnkit ...` names a verb that exists, with options that it has."""
    found = list(_commands())
    assert len(found) > 50
    for page, line in found:
        command: click.Command = main
        for word in line.split()[1:]:
            if isinstance(command, click.Group) and not word.startswith("-"):
                child = command.get_command(click.Context(command), word)
                assert child is not None, f"{page}: {line}: no command {word!r}"
                command = child
            elif word.startswith("-"):
                options = {name for option in command.params for name in option.opts} | {"--help"}
                assert word in options, f"{page}: {line}: {command.name} has no {word}"


def test_deviation_is_quoted_as_it_was_measured() -> None:
    """Every row of the table in docs/numerics.md is one of the result file, and the names that it uses are described."""
    from attnkit.lab.numerics import DISTRIBUTIONS, FORMATS
    from attnkit.report import SECTIONS, read_envelope

    document = read_envelope(ROOT / "benchmarks" / "results" / "numerics-deviation.json")
    table = SECTIONS[document["schema"]].draw(document).blocks[-1]
    measured = {(*row[:5], row[5].split("(")[1].removesuffix("\u00d7)")) for row in table.rows}
    text = (DOCS / "numerics.md").read_text(encoding="utf-8")
    quoted = [tuple(line.strip("| ").split(" | ")) for line in text.splitlines() if re.match(r"\| (bf16|fp16) \|", line)]
    assert len(quoted) >= 8
    assert [row for row in quoted if row not in measured] == []
    assert [name for name in FORMATS if f"`{name}`" not in text] == []
    assert {row[1] for row in quoted} <= set(DISTRIBUTIONS)


def test_the_reproduction_is_quoted_as_it_was_measured() -> None:
    from attnkit.report import number, read_envelope

    document = read_envelope(ROOT / "benchmarks" / "results" / "numerics-reproduce-cpu.json")
    text = (DOCS / "numerics.md").read_text(encoding="utf-8")
    measured = {(row["name"], number(row["bias_ulp"])) for row in document["rows"][:10]}
    part = text[text.index("## A failure, scaled down") :].split("\n## ")[0]
    quoted = [tuple(line.strip("| ").split(" | ")) for line in part.splitlines() if re.match(r"\| r", line)]
    assert len(quoted) == 5
    assert set(quoted) <= measured
    assert max(abs(row["z"]) for row in document["rows"] if row["part"] == "training") < 2.5
    assert max(row["error"] for row in document["rows"] if row["part"] == "algebra") < 2e-13


def test_divergence_is_quoted_as_it_was_measured() -> None:
    """Every row of the table in docs/numerics.md is what its result file says of the last step."""
    from attnkit.report import interval, read_envelope

    measured = set()
    for path in (ROOT / "benchmarks" / "results").glob("numerics-weights*.json"):
        if path.stem.endswith("-gpu"):
            continue
        document = read_envelope(path)
        last, study = document["significance"][-1], document["study"]
        rate = "" if study["learning_rate"] == 1e-3 else f", learning rate {study['learning_rate']:.0e}".replace("e-0", "e-")
        ratios = [interval(*(last[metric][part] for part in ("value", "low", "high")), 2) for metric in ("max_abs", "w1")]
        measured.add((f"seed {study['seed']}{rate}", *ratios))
    text = (DOCS / "numerics.md").read_text(encoding="utf-8")
    quoted = {tuple(line.strip("| ").split(" | ")) for line in text.splitlines() if line.startswith("| seed ")}
    assert len(quoted) == 5
    assert quoted == measured
    last = read_envelope(ROOT / "benchmarks" / "results" / "numerics-weights-gpu.json")["significance"][-1]
    for metric in ("max_abs", "w1"):
        ratio = interval(*(last[metric][part] for part in ("value", "low", "high")), 2)
        assert ratio in re.sub(r"\s+", " ", text)


def test_kernels_are_quoted_as_they_were_measured() -> None:
    """The table of docs/numerics.md, and what it says of torch's kernel, from all three files."""
    from attnkit.report import read_envelope

    text = (DOCS / "numerics.md").read_text(encoding="utf-8")
    plain, true, delta = "attnkit:triton", "attnkit:triton:out_dtype=float32", "attnkit:triton:stable=delta:out_dtype=float32"
    peers, quotients = [], {}
    for width in (64, 128, 256):
        rms: dict[tuple[str, str, int, int], dict[str, float]] = {}
        for row in read_envelope(ROOT / "benchmarks" / "results" / f"numerics-kernels-d{width}.json")["rows"]:
            rms.setdefault((row["format"], row["distribution"], row["length"], row["seed"]), {})[row["algorithm"]] = row["rms"]
            if row["algorithm"] == plain:
                assert row["ulp_row_max"] < 1.06
        peers += [cell[plain] / cell["sdpa-flash"] for cell in rms.values()]
        if width == 128:
            quotients = {
                key[0::2]: cell[true] / cell[delta] for key, cell in rms.items() if key[1] == "value-mean" and key[3] == 0
            }
    assert f"{min(peers):.3f} to {max(peers):.3f} times its rms" in text
    part = text[text.index("## Kernels") :].split("\n## ")[0]
    for line in re.findall(r"\| [\d,]+ \| .*", part):
        length, *quoted = line.strip("| ").split(" | ")
        measured = [quotients[dtype, int(length.replace(",", ""))] for dtype in ("bf16", "fp16")]
        assert [float(value) for value in quoted] == [float(f"{value:.2g}") for value in measured]


def _race_table(page: str, heading: str) -> list[list[str]]:
    part = (DOCS / page).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")][2:]


def _race(name: str) -> list[dict[str, Any]]:
    from attnkit.report import read_envelope

    rows: list[dict[str, Any]] = read_envelope(ROOT / "benchmarks" / "results" / f"{name}.json")["rows"]
    return rows


def test_races_of_sparse_attention_are_quoted_as_they_were_run() -> None:
    rows = [*_race("hash_sparse_attention"), *_race("hash_sparse_attention-64k"), *_race("qk_sparse_attention")]
    table = _race_table("scfa.md", "How fast it is")
    assert len(table) == 4
    for length, what, ms, cudnn, best, varlen in table:
        tokens = int(length.replace(",", ""))
        mine = [row for row in rows if row["shape"]["T"] == tokens and ("keep" in row["shape"]) == ("dropped" in what)]
        found = {row["peer"]: row for row in mine}
        assert f"{found['cudnn*']['ours_ms']:.1f}" == ms
        assert f"{found['cudnn*']['ratio']:.2f}" == cudnn
        assert f"{found['cudnn*']['facts']['ideal_by_tiles']:.1f}" == best
        assert (f"{found['varlen']['ratio']:.2f}" if "varlen" in found else "-") == varlen
    page = (DOCS / "scfa.md").read_text(encoding="utf-8")
    ours, cudnn = ({row["peer"]: row for row in _race("qk_sparse_attention")}[name] for name in ("dense*", "cudnn*"))
    best = ours["facts"]["ideal_by_tiles"]
    assert f"gains {ours['ratio'] / best:.2f} of the best" in page
    assert f"against cuDNN it is {cudnn['ratio'] / best:.2f}" in page
    assert f"takes {ours['peer_ms'] / cudnn['peer_ms']:.2f} times cuDNN's time" in " ".join(page.split())


def test_races_of_entmax_attention_are_quoted_as_they_were_run() -> None:
    rows = {(row["shape"]["scores"], row["peer"]): row for row in _race("entmax_attention")}
    table = _race_table("entmax.md", "How fast it is")
    for name, (_, empty, ms, adasplash, cudnn) in zip(("gauss", "flat", "empty60", "empty95"), table, strict=True):
        peer, dense = rows[name, "adasplash"], rows[name, "cudnn*"]
        assert f"{100 * peer['facts']['empty_tiles']:.0f} %" == empty
        assert [f"{peer['ours_ms']:.1f}", f"{peer['ratio']:.2f}", f"{dense['ratio']:.2f}"] == [ms, adasplash, cudnn]


def test_races_of_recurrences_are_quoted_as_they_were_run() -> None:
    """The times of docs/chunkwise.md: mLSTM, lightning attention, dense attention beside it, steps."""

    def both(rows: list[dict[str, Any]]) -> list[str]:
        first, second = (next(row for row in rows if row["pass"] == name) for name in ("fwd", "fwd+bwd"))
        values = [first["ours_ms"], first["ratio"], second["ours_ms"], second["ratio"]]
        return [f"{value:.2f}" for value in (*values, second["peak_mib"] / second["peer_peak_mib"])]

    page = (DOCS / "chunkwise.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    rows = [row for row in _race("mlstm") if row["peer"] != "fla" and row["shape"]["T"] == 8192]
    mlstm = [both([row for row in rows if (row["shape"]["D"], row["shape"]["gates"]) == key]) for key in (
        (128, "exp"), (128, "sigmoid"), (128, "plain"), (256, "exp"), (256, "plain"))]  # fmt: skip
    lightning = _race("lightning_attention")
    mlstm += [both([row for row in lightning if row["shape"]["T"] == length]) for length in (4096, 32768)]
    assert [line[1:] for line in lines if len(line) == 6 and "." in line[1] and "tokens" not in line[0]][: len(mlstm)] == mlstm
    (fla,) = (row["ratio"] for row in _race("mlstm") if row["peer"] == "fla")
    assert f"the forward pass is {fla:.2f} times as" in page
    dense = {(row["shape"]["T"], row["peer"]): row for row in _race("mlstm-crossing")}
    for length in (2048, 8192, 16384, 32768):
        row, *others = (dense[length, f"{peer}*"] for peer in ("fa4", "cudnn", "sdpa-flash"))
        times = [dense[length, "cudnn*"]["ours_ms"], row["peer_ms"], *(other["peer_ms"] for other in others)]
        assert [f"{length:,}", *(f"{ms:.1f}" for ms in times), f"{row['ratio']:.2f}"] in lines
    lengths = _race("mlstm-lengths")
    for tokens, gates in ((512, "exp"), (512, "sigmoid"), (65536, "exp"), (65536, "sigmoid")):
        found = both([row for row in lengths if (row["shape"]["T"], row["shape"]["gates"]) == (tokens, gates)])
        assert found in [line[2:] for line in lines]
    for row in (*_race("mlstm_step"), *_race("scalar_decay_step")):
        if row["peer"] == "attnkit:torch":
            found = [f"{1e3 * row['ours_ms']:.0f}", f"{row['bandwidth_share']:.2f}", f"{row['ratio']:.1f}"]
            assert found in [line[1:] for line in lines]


def test_races_of_the_cache_are_quoted_as_they_were_run() -> None:
    rows = {(row["shape"]["B"], row["shape"]["T"], row["peer"]): row for row in _race("expected_attention_scores")}
    table = _race_table("kv.md", "What choosing costs")
    assert len(table) == len(rows) // 2
    for what, ms, share, peer_ms, ratio in table:
        batch, tokens = (int(part.replace(",", "")) for part in what.split(" x "))
        peer, layer = (rows[batch, tokens, f"{name}*"] for name in ("kvpress-unjudged", "llama-8b-layer"))
        assert [f"{peer['ours_ms']:.2f}", f"{peer['peer_ms']:.2f}", f"{peer['ratio']:.1f}"] == [ms, peer_ms, ratio]
        assert f"{100 / layer['ratio']:.1f} %" == share
    page = (DOCS / "ragged.md").read_text(encoding="utf-8")
    for row in _race("ragged_decode_attention-int4"):
        numbers = [f"{1e3 * ms:,.0f}" for ms in (row["ours_ms"], row["peer_ms"])]
        cells = [f"{row['shape']['B']} x {row['shape']['S']:,}", *numbers, f"{row['ratio']:.1f}"]
        assert f"| {' | '.join(cells)} |" in page


def test_methods_are_described() -> None:
    from attnkit.inference import available
    from attnkit.lab.compare import METHODS
    from attnkit.testing import FAMILIES

    pages = ("inference", "compare", "presses")
    inference, compare, presses = ((DOCS / f"{name}.md").read_text(encoding="utf-8") for name in pages)
    assert [name for name in (*available(), *FAMILIES) if f"`{name}`" not in inference + presses] == []
    assert [name for name in METHODS if f"`{name}`" not in compare] == []
    low, high = (".".join(map(str, bound)) for bound in TESTED_TRANSFORMERS)
    assert f"{low}..{high}" in inference


def test_models_are_described() -> None:
    from attnkit.models import MIXERS, MLPS
    from attnkit.models.auto import FAMILIES

    text = (DOCS / "models.md").read_text(encoding="utf-8")
    own = [name for name in MIXERS if MIXERS[name].build.__module__.startswith(("attnkit", "functools"))]
    classes = [part.__name__ for family in FAMILIES for part in (family[1], family[3])]
    assert [name for name in (*own, *MLPS, *classes) if f"`{name}`" not in text] == []


def test_races_and_their_peers_are_described() -> None:
    from attnkit.lab.bench import RACES

    text = (DOCS / "race.md").read_text(encoding="utf-8")
    assert [name for race in RACES.values() for name in (race.op, *race.peers, *race.passes) if f"`{name}`" not in text] == []


def test_results_are_drawn_where_there_are_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = script("generate")
    monkeypatch.setattr(generate, "RESULTS", tmp_path)
    assert "None is there yet" in generate.pages()["results.md"]
    write_json(tmp_path / "attention.json", race_envelope() | {"command": "attnkit bench kernels attention"})
    write_json(tmp_path / "compare.json", compare_envelope())
    page = generate.pages()["results.md"]
    assert re.findall("^##+ .*", page, re.MULTILINE) == ["## attention.json", "### Every race of attention"]
    assert "| fwd | 4,096 | flash-attn-4 | 1.70 | 1.65 | 0.97 \u25bc |" in page
    assert "- device: `NVIDIA H200`" in page


def test_channel_orders_are_described() -> None:
    from attnkit.inference import compat

    text = (DOCS / "inference.md").read_text(encoding="utf-8")
    for family, types in (("(i, i + R/2)", compat.HALF_SPLIT), ("(2i, 2i + 1)", compat.INTERLEAVED)):
        row = next(line for line in text.splitlines() if line.startswith(f"| {family} |"))
        assert row.split("|")[2].replace(" ", "").split(",") == sorted(types)


def test_environment_variables_are_described() -> None:
    declared = set(re.findall(r"ATTNKIT_[A-Z_]+", (SOURCE / "_core" / "settings.py").read_text(encoding="utf-8")))
    described = set(re.findall(r"^\| `(ATTNKIT_[A-Z_]+)`", (DOCS / "start.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert described == declared


def test_examples_are_described() -> None:
    text = (DOCS / "start.md").read_text(encoding="utf-8")
    assert [path.name for path in (ROOT / "examples").glob("*.py") if f"`examples/{path.name}`" not in text] == []


def test_make_targets_are_described() -> None:
    """CONTRIBUTING names no target that does not exist, and leaves out only those for help and cleaning up."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"^\| `make ([a-z-]+)`", text, re.MULTILINE))
    assert named <= targets
    assert targets - named <= {"help", "clean"}


@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason='needs pip install "attnkit[docs]"')
def test_site_builds_without_a_warning_and_holds_every_public_name(tmp_path: Path) -> None:
    source = tmp_path / "docs"
    shutil.copytree(DOCS, source, ignore=shutil.ignore_patterns("_build"))
    for page in ROOT.glob("*.md"):
        shutil.copy(page, tmp_path)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", source, tmp_path / "site"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    from sphinx.util.inventory import InventoryFile

    with (tmp_path / "site" / "objects.inv").open("rb") as stream:
        inventory = InventoryFile.load(stream, "", lambda base, uri: uri)
    documented = {name for kind, entries in inventory.items() if kind.startswith("py:") for name in entries}
    assert sorted(public_names() - documented) == []
    html = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "site").glob("*.html"))
    assert re.findall(r'(?:src|href)="https?://(?!arxiv\.org)[^"]*\.(?:js|css)', html) == [], "a page loads from the network"
