"""The HTML page: well formed, self-contained, honest about what it shows."""

import re
import time
from html.parser import HTMLParser
from typing import Any

import pytest

from attnkit import report
from attnkit._core.errors import InputError, MissingExtra
from attnkit.report import compare, page, race
from attnkit.report.plots import encoded
from report_examples import compare_envelope, race_envelope, skipped_entries

pytest.importorskip("matplotlib")


class Page(HTMLParser):
    """Checks that elements nest, and collects ids, references, external addresses and text."""

    VOID = ("meta", "br", "link", "img", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.labels: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.stack == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href"):
                self.links.append(value or "")
            if name == "aria-label" and tag == "svg":
                self.labels.append(value or "")
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.text += data


def test_page_of_everything_is_self_contained_and_well_formed() -> None:
    other = {"schema": "other/1", "rows": [{"a": 1, "text": "<script>x</script>", "deep": [1]}, {"a": None, "b": "\u00e9"}]}
    html = report.render_html([compare_envelope(), race_envelope(), other])
    parsed = Page(html)
    assert all(link.startswith("#") for link in parsed.links)
    assert "script" not in parsed.tags
    assert not re.search(r"https?://(?!www\.w3\.org/)", html)
    assert not re.search(r"@import|url\((?!#)", html)
    assert len(parsed.ids) == len(set(parsed.ids))
    referenced = {link[1:] for link in parsed.links} | set(re.findall(r"url\(#([\w-]+)\)", html))
    assert referenced <= set(parsed.ids)
    assert "<script>x</script>" in parsed.text
    assert "deep" not in parsed.text
    assert len(html.encode()) < 400_000


def test_page_follows_the_reader_light_dark_and_paper() -> None:
    html = report.render_html([compare_envelope()])
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert not re.search(r"#[0-9a-f]{6}\b", drawings), "a colour that does not follow the page"
    assert "DejaVu" not in drawings


def test_page_describes_its_pictures_in_words() -> None:
    labels = Page(report.render_html([compare_envelope()])).labels
    assert len(labels) == 4
    assert "streaming at 4096: 2.846" in labels[0]
    assert "trials missed in all" in labels[1]
    assert "window at 4096: 2/10" in labels[2]
    assert "snapkv: loss 2.619" in labels[3]


def test_page_says_first_what_came_out() -> None:
    text = Page(report.render_html([compare_envelope()])).text
    assert "dense at 4,096 tokens: loss 2.598, 10 of 10 pass-keys found." in text
    assert "yarn: lowest loss besides dense; loss +0.013, 8 of 10 pass-keys found." in text
    assert (
        "streaming: shortest prefill (0.78\u00d7), fastest decoding (1.46\u00d7), smallest KV cache (0.26\u00d7); loss +0.248"
        in text
    )


def test_gains_within_the_noise_are_no_merit() -> None:
    document = compare_envelope(lengths=(1024,), methods=("dense", "yarn"))
    document["rows"][1]["prefill_s"] = 0.97 * document["rows"][0]["prefill_s"]
    section = compare.SPEC.draw(document)
    assert section.lead[1] == "yarn: lowest loss besides dense; loss +0.018, 10 of 10 pass-keys found."
    document["rows"][1]["prefill_s"] = 0.9 * document["rows"][0]["prefill_s"]
    assert "shortest prefill (0.90\u00d7)" in compare.SPEC.draw(document).lead[1]


def quality(document: dict[str, Any]) -> page.Table:
    section = compare.SPEC.draw(document)
    return next(block for block in section.blocks if isinstance(block, page.Table) and block.title == "Quality")


def test_baseline_comes_first_and_the_best_is_marked() -> None:
    document = compare_envelope(lengths=(1024, 2048), methods=("window", "dense"))
    document["rows"][2]["loss"] = 2.0  # window at 2,048: better than dense
    rows = quality(document).rows
    assert [row[:2] for row in rows] == [
        ["1,024", "dense"],
        ["1,024", "window"],
        ["2,048", "dense"],
        ["2,048", "window"],
    ]
    assert ["\u2605" in row[2] for row in rows] == [True, False, False, True]
    assert rows[0][3] == "10/10 (82 to 100 %)"  # both found all: nobody is best


def test_missing_values_leave_gaps_and_no_errors() -> None:
    document = compare_envelope(lengths=(1024,))
    for row in document["rows"]:
        row |= {"loss": None, "loss_low": None, "decode_tok_s": None, "kv_mib": None, "passkey_trials": 0, "trials": []}
    parsed = Page(report.render_html([document]))
    assert parsed.text.count("Pass-keys by") == 0
    document["rows"] = []
    assert "No method was run." in report.render_html([document])
    assert "No race was run." in report.render_html([{**race_envelope(), "rows": []}])


def test_shared_prefills_are_marked() -> None:
    section = compare.SPEC.draw(compare_envelope(lengths=(1024,)))
    cost = next(block for block in section.blocks if isinstance(block, page.Table) and block.title == "Cost")
    assert [row[1] for row in cost.rows if "\u2020" in row[2]] == ["dense", "snapkv"]
    assert "\u2020" in cost.note


def test_one_length_has_no_picture_over_length() -> None:
    titles = [block.title for block in compare.SPEC.draw(compare_envelope(lengths=(1024,))).blocks]
    assert "Pass-keys by length" not in titles
    assert "Pass-keys by depth" in titles


def test_races_name_winners_and_move_what_is_common_into_the_head() -> None:
    section = report.SECTIONS["attnkit.race/1"].draw(race_envelope())
    assert section.lead[0] == "Against flash-attn-4: faster in 0 of 4 races, 0.97\u00d7 in the geometric mean."
    assert ("dtype", "bf16") in list(section.facts)
    every = next(block for block in section.blocks if isinstance(block, page.Table))
    assert "dtype" not in every.headers
    assert [row[list(every.headers).index("peer / ours")] for row in every.rows[:2]] == ["0.97 \u25bc", "1.12 \u25b2"]


@pytest.mark.parametrize(
    ("ratios", "text"),
    [
        ((1.1, 1.2, 1.3), "pays at every length"),
        ((0.9, 1.2, 1.3), "pays from 2,048 tokens"),
        ((1.1, 0.9, 1.3), "pays from 4,096 tokens"),  # what is lost again in between does not count
        ((1.1, 1.2, 0.9), "never pays up to 4,096 tokens"),
        ((0.9, 0.9, 1.0), "never pays up to 4,096 tokens"),
    ],
)
def test_a_race_says_from_where_ours_pays(ratios: tuple[float, ...], text: str) -> None:
    rows = race_envelope(lengths=(1024, 2048, 4096))["rows"]
    kept = [row for row in rows if row["peer"] == "flex_attention" and row["pass"] == "fwd"]
    changed = [row | {"ratio": ratio} for row, ratio in zip(kept, ratios, strict=True)]
    assert race.crossovers(list(reversed(changed))) == [f"Against flex_attention ours {text}."]


def test_crossovers_tell_passes_apart_where_they_differ() -> None:
    rows = race_envelope()["rows"]
    for row in rows:
        if row["pass"] == "fwd+bwd":
            row["ratio"] = 2.0
    assert race.crossovers(rows)[0] == (
        "Against flash-attn-4 ours never pays up to 16,384 tokens (fwd); pays at every length (fwd+bwd)."
    )


def test_decoding_counts_its_keys_as_tokens() -> None:
    rows = race_envelope()["rows"]
    decode = [row | {"pass": "decode", "shape": row["shape"] | {"T": 1, "S": row["shape"]["T"]}} for row in rows[:3]]
    section = race.SPEC.draw(race_envelope() | {"rows": [*rows, *decode]})
    every = next(block for block in section.blocks if isinstance(block, page.Table))
    assert list(every.headers)[:3] == ["pass", "tokens", "peer"]
    assert list(every.rows[-1])[:2] == ["decode", "4,096"]
    assert ("shape", "B=1 H=32 D=128") in list(section.facts)


def test_who_was_not_raced_is_on_the_page_with_the_reason() -> None:
    document = race_envelope() | {"skipped": skipped_entries(), "finished": ["a", "b", "c", "d", "e"]}
    absent = race.SPEC.draw(document).blocks[-1]
    assert isinstance(absent, page.Table)
    assert [list(row) for row in absent.rows] == [
        ["fa4", "flash_attn is not installed", "all"],
        ["attnkit", "out of memory", "fwd B=1 T=16384 H=32 D=128"],
    ]
    assert absent.note == "Where attnkit did not run, nobody was raced."
    document |= {"skipped": skipped_entries()[:5], "finished": ["a"] * 9, "rows": []}
    (absent,) = race.SPEC.draw(document).blocks
    assert isinstance(absent, page.Table)
    assert absent.rows[0][2].endswith("fwd B=1 T=8192 H=32 D=128; 1 more")
    assert absent.note == ""


def test_a_race_of_one_length_has_a_dot_a_race_and_one_of_several_a_line_a_peer() -> None:
    one, several = (Page(report.render_html([race_envelope(lengths)])) for lengths in ((4096,), (4096, 16384)))
    assert "Right of the line ours is faster." in one.text
    assert "fwd against flash-attn-4: 0.97" in one.labels[0]
    assert "Above the line ours is faster." in several.text
    assert "fwd against flash-attn-4: 0.97 at 4,096, 0.97 at 16,384" in several.labels[0]


def test_a_race_of_one_row_still_draws() -> None:
    document = race_envelope()
    document["rows"] = document["rows"][:1]
    assert len(Page(report.render_html([document])).labels) == 1


def test_rows_that_lack_fields_are_named() -> None:
    document = compare_envelope()
    del document["rows"][3]["loss"]
    with pytest.raises(InputError, match=r"row 3 of a attnkit.compare/1 result lacks loss"):
        report.render_html([document])


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(InputError, match="documents is empty"):
        report.render_html([])


def test_without_matplotlib_there_are_tables_and_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def require(module: str, *, extra: str) -> Any:
        if module == "matplotlib":
            raise MissingExtra("no")
        return pytest.importorskip(module)

    monkeypatch.setattr(page, "require", require)
    parsed = Page(report.render_html([compare_envelope()]))
    assert "svg" not in parsed.tags
    assert "matplotlib is not installed" in parsed.text
    assert "Quality" in parsed.text


def test_two_hundred_rows_stay_small_and_quick() -> None:
    document, rows = compare_envelope(), compare_envelope()["rows"]
    places = [(method, length) for length in range(15) for method in range(14)]
    document["rows"] = [
        {**rows[sum(place) % len(rows)], "method": f"method-{place[0]}", "length": 512 * (place[1] + 1)} for place in places
    ]
    report.render_html([compare_envelope()])  # fonts and templates load once
    started = time.process_time()
    html = report.render_html([document])
    assert time.process_time() - started < 4  # below 1 s on an idle machine
    assert len(document["rows"]) == 210
    assert len(html.encode()) < 400_000


def test_pages_are_reproducible() -> None:
    assert report.render_html([compare_envelope()]) == report.render_html([compare_envelope()])


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_figures_are_encoded_as_they_are_named(kind: str, start: bytes) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    assert encoded(figure, kind).startswith(start)
