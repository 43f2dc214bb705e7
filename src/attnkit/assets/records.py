"""PubMed records: titles and abstracts of two MEDLINE files."""

import gzip
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

__all__ = ["records"]


def records(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (PMID, text) of every record in a gzipped MEDLINE file: the title, then the paragraphs of the abstract."""
    with gzip.open(path, "rb") as stream:
        for _, element in ElementTree.iterparse(stream):
            if element.tag == "PubmedArticle":
                yield element.findtext(".//PMID") or "", _text(element)
                element.clear()


def _text(record: ElementTree.Element) -> str:
    title = record.find(".//ArticleTitle")
    paragraphs = [] if title is None else [_flat(title)]
    for part in record.iterfind(".//Abstract/AbstractText"):
        label = part.get("Label")
        paragraphs.append(f"{label}: {_flat(part)}" if label else _flat(part))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _flat(element: ElementTree.Element) -> str:
    """The text inside, marks such as <i> and <sub> removed."""
    return " ".join("".join(element.itertext()).split())
