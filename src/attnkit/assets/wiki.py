"""Wikipedia mark-up to plain prose: what a reader of the page would read, without tables, notes and navigation."""

import bz2
import html
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

__all__ = ["articles", "strip_markup"]

_DROPPED_TAGS = "ref|math|chem|gallery|timeline|imagemap|score|source|syntaxhighlight|table|references"
_DROPPED_LINKS = ("file:", "image:", "category:", "media:", "template:")
_LANGUAGE_LINK = re.compile(r"[a-z]{2,3}(-[a-z]+)*:\S")  # [[de:Anarchismus]], the same page elsewhere
_HEADING = re.compile(r"(={2,6})\s*(.*?)\s*\1")
# Sections that list sources or links: nothing in them is prose.
_BACK_MATTER = re.compile(
    r"see also|(explanatory |foot)?notes|references|notes and references|references and notes|citations|sources|bibliography"
    r"|(cited|primary|secondary) sources|further reading|external links|works cited|gallery|literature",
    re.IGNORECASE,
)
# Templates whose first or last argument is part of a sentence; any template that is not named here is furniture and goes.
_FIRST = {
    "quote",
    "blockquote",
    "quotation",
    "cquote",
    "nihongo",
    "angbr",
    "angle bracket",
    "vr",
    "keypress",
    "key press",
    "val",
    "nts",
}
_LAST = {"lang", "transl", "nowrap", "nobr", "small", "smaller", "big", "abbr", "sc", "script", "unicode", "polytonic"}
_NAMED = re.compile(r"\s*([\w -]*\w)\s*=")
_SIGNS = {
    "ndash": "\u2013",
    "mdash": "\u2014",
    "spaced ndash": " \u2013 ",
    "snd": " \u2013 ",
    "nbsp": " ",
    "'s": "'s",
    "'": "'",
    "·": "·",
}
_UNITS = {"sqmi": "sq mi", "sqkm": "km²", "km2": "km²", "m2": "m²", "m3": "m³", "C": "°C", "F": "°F"}
_RANGES = {"to", "and", "-", "\u2013", "x", "by", "to(-)", "or"}
_FRAMES = {"}}": "{{", "]]": "[[", "|}": "{|"}
_TOKENS = re.compile(r"(\{\{|\}\}|\[\[|\]\]|^[ :*]*\{\|(?!\})|^ *\|\}(?!\}))", re.MULTILINE)


def articles(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (title, wiki mark-up) of every article in a bz2 export; redirects and other namespaces are skipped."""
    with bz2.open(path, "rb") as stream:
        for _, element in ElementTree.iterparse(stream):
            if not element.tag.endswith("}page"):
                continue
            space = element.tag.removesuffix("page")
            if element.findtext(f"{space}ns") == "0" and element.find(f"{space}redirect") is None:
                yield element.findtext(f"{space}title") or "", element.findtext(f"{space}revision/{space}text") or ""
            element.clear()


def strip_markup(source: str) -> str:
    """Turn the mark-up of one article into paragraphs separated by blank lines; headings stand on lines of their own."""
    text = re.sub(r"<!--.*?-->", "", source, flags=re.DOTALL)
    text = re.sub(rf"<({_DROPPED_TAGS})\b[^<>]*/>", "", text, flags=re.IGNORECASE)
    text = re.sub(rf"<({_DROPPED_TAGS})\b[^<>]*>.*?</\1\s*>", "", text, flags=re.IGNORECASE | re.DOTALL)
    text = _unfold(text)
    text = re.sub(r"\[(?:https?:|ftp:)?//[^\s\]]+(?:\s+([^\]]*))?\]", lambda found: found[1] or "", text)
    text = re.sub(r"<br\s*/?>|<hr\s*/?>", " ", text, flags=re.IGNORECASE)
    text = re.sub(r"</?[a-zA-Z][^<>]*>", "", text)
    text = re.sub(r"'{2,5}|__[A-Z]+__", "", text)
    return _paragraphs(html.unescape(text).replace("\u00a0", " "))


def _unfold(text: str) -> str:
    """Replace templates, links and tables from the inside out, in one pass; what is never closed stays as it is written."""
    replace: dict[str, Callable[[str], str]] = {"{{": _template, "[[": _link, "{|": lambda _: ""}
    frames: list[tuple[str, list[str]]] = [("", [])]
    for token in _TOKENS.split(text):
        mark = token.strip(" :*")
        if mark in replace:
            frames.append((mark, []))
            continue
        opener = _FRAMES.get(mark)
        if opener is None or all(kind != opener for kind, _ in frames):
            frames[-1][1].append(token)
            continue
        while frames[-1][0] != opener:
            _keep_literally(frames)
        _, parts = frames.pop()
        frames[-1][1].append(replace[opener]("".join(parts)))
    while len(frames) > 1:
        _keep_literally(frames)
    return "".join(frames[0][1])


def _keep_literally(frames: list[tuple[str, list[str]]]) -> None:
    opener, parts = frames.pop()
    frames[-1][1].extend([opener, *parts])


def _link(content: str) -> str:
    target, _, label = content.partition("|")
    target = target.strip()
    if target.lower().startswith(_DROPPED_LINKS) or _LANGUAGE_LINK.match(target):
        return ""
    return label.rpartition("|")[2] if label else target.lstrip(":")


def _template(content: str) -> str:
    name, *arguments = content.split("|")
    name = name.strip().lower()
    named = [_NAMED.match(argument) for argument in arguments]
    plain = [
        argument[found.end() if found else 0 :].strip()
        for argument, found in zip(arguments, named, strict=True)
        if found is None or found[1] in ("1", "text", "quote")
    ]
    if name in _SIGNS:
        return _SIGNS[name]
    if not plain:
        return ""
    if name in _FIRST:
        return plain[0]
    if name in _LAST or name.startswith("lang-"):
        return plain[-1]
    if name in ("convert", "cvt"):
        return _quantity(plain)
    if name in ("c.", "circa"):
        return f"c. {plain[0]}"
    if name == "as of":
        return f"{'as' if 'lc=y' in arguments else 'As'} of {plain[0]}"
    if name == "frac":
        return "/".join(plain[-2:]) if len(plain) > 1 else f"1/{plain[0]}"
    return ""


def _quantity(arguments: list[str]) -> str:
    """{{convert|10|to|20|km|mi}} -> "10 to 20 km"."""
    words = arguments[:1]
    rest = arguments[1:]
    while len(rest) > 1 and rest[0] in _RANGES:
        words += rest[:2]
        rest = rest[2:]
    unit = rest[0] if rest else ""
    return " ".join([*words, _UNITS.get(unit, unit)]).strip()


def _paragraphs(text: str) -> str:
    """Drop back matter, headings without text and list marks; one paragraph per block."""
    blocks: list[str] = []
    headings: list[str] = []
    skipped_level = 0
    for line in text.splitlines():
        heading = _HEADING.fullmatch(line.strip())
        if heading:
            level, title = len(heading[1]), _tidy(heading[2])
            if skipped_level and level > skipped_level:
                continue
            skipped_level = level if _BACK_MATTER.fullmatch(title) else 0
            headings = [title] if not skipped_level else []
            continue
        prose = _tidy(line.strip().lstrip("*#:; "))
        if (
            prose
            and not skipped_level
            and any(letter.isalnum() for letter in prose)
            and not line.lstrip().startswith(("|", "!"))
        ):
            blocks += [*headings, prose]
            headings = []
    return "\n\n".join(blocks)


def _tidy(text: str) -> str:
    """Close the gaps that removed mark-up leaves: empty brackets, stray punctuation, doubled spaces."""
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"\(\s*(?:[;,:/\u2013·]|or|and)*\s*", "(", text)
    text = re.sub(r"[\s;,:]+\)", ")", text)
    text = re.sub(r"\s*\(\)", "", text)
    return re.sub(r" +([,.;:!?%)])", r"\1", text).strip()
