"""Texts for experiments: documents of assets, or a file of the user's own."""

import hashlib
import struct
import sys
import sysconfig
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from attnkit._core.errors import InputError, OptionError
from attnkit.assets.catalogue import ASSETS
from attnkit.assets.locate import find
from attnkit.assets.records import records
from attnkit.assets.wiki import articles, strip_markup

__all__ = ["TEXTS", "Document", "documents", "lm_path", "load_text", "text_identity"]

_RDATA_STRING_VECTOR = 16


@dataclass(frozen=True)
class Document:
    """A named text; paragraphs are separated by blank lines."""

    name: str
    text: str


def lm_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct; tokenizer and chat template are inside it.

    Raises:
        MissingAsset: not installed; the message ends with the fetch line.
    """
    return find("lm", "SmolLM2-135M-Instruct.Q4_1.gguf")


def load_text(source: str) -> list[Document]:
    """Documents of a text asset, or the one document in a UTF-8 file.

    Args:
        source: one of TEXTS, or a path.
    Raises:
        OptionError: neither a text asset nor a file.
        InputError: the file is not UTF-8, or it holds no text.
        MissingAsset: the asset is not installed; the message ends with the fetch line.
    """
    if source in _LOADERS:
        return documents(source)
    path = _file(source)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"text {source!r} is not UTF-8 (byte {error.start}); convert it: iconv -t UTF-8") from error
    if not text.strip():
        raise InputError(f"text {source!r} is empty; give a file with text in it")
    return [Document(path.name, text)]


def documents(key: str) -> list[Document]:
    """All documents of a text asset, longest first.

    Args:
        key: "wiki" (106 articles as plain prose), "novels" (six novels), "pubmed" (50,734 titles, most with their abstracts) or
            "stdlib" (the modules of this Python's standard library, as code).
    Raises:
        OptionError: not a text asset.
        MissingAsset: the asset is not installed; the message ends with the fetch line.
    """
    if key not in _LOADERS:
        raise OptionError(f"asset {key!r} carries no plain text; choose {', '.join(_LOADERS)}")
    return list(_read(key))


def text_identity(source: str) -> str:
    """SHA-256 of what a text is read from: it changes when the text does, and is much quicker to have than the text.

    Raises:
        OptionError, MissingAsset: as `load_text`.
    """
    if source == "stdlib":
        return hashlib.sha256(sys.version.encode()).hexdigest()
    if source in _LOADERS:
        paths = [find(source, name) for package in ASSETS[source].packages for name in package.files]
    else:
        paths = [_file(source)]
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _file(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.is_file():
        reason = "carries no plain text" if source in ASSETS else "is not a file"
        raise OptionError(f"text {source!r} {reason}; choose {', '.join(_LOADERS)}, or give the path of a UTF-8 text file")
    return path


@cache
def _read(key: str) -> tuple[Document, ...]:
    return tuple(sorted(_LOADERS[key](), key=lambda document: len(document.text), reverse=True))


def _wiki() -> list[Document]:
    path = find("wiki", "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2")
    return [Document(title, strip_markup(source)) for title, source in articles(path)]


def _novels() -> list[Document]:
    novels = []
    for lines in _string_vectors(find("novels", "Rdata.rdb").read_bytes()):
        paragraphs = "\n".join(lines).split("\n\n")
        text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())
        novels.append(Document(lines[0].title().replace(" And ", " and "), text))
    return novels


def _pubmed() -> list[Document]:
    files = [find("pubmed", name) for name in ("pubmed20n0014.xml.gz", "pubmed21n1298.xml.gz")]
    return [Document(number, text) for path in files for number, text in records(path) if text]


def _stdlib() -> list[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    modules = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not left_out & set(name.parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                modules.append(Document(name.as_posix(), text))
    return modules


def _string_vectors(data: bytes) -> list[list[str]]:
    """R's lazy-load database: chunks of (big-endian raw length, zlib stream), here each one XDR character vector."""
    vectors = []
    while data:
        stream = zlib.decompressobj()
        raw = stream.decompress(data[4:])
        vectors.append(_string_vector(raw))
        data = stream.unused_data
    return vectors


def _string_vector(raw: bytes) -> list[str]:
    (version,) = struct.unpack_from(">i", raw, 2)
    offset = 14  # "X\n", then format version, writer version, minimal reader version
    if version == 3:
        (length,) = struct.unpack_from(">i", raw, offset)
        offset += 4 + length  # the name of the native encoding
    flags, count = struct.unpack_from(">ii", raw, offset)
    if flags & 0xFF != _RDATA_STRING_VECTOR:
        raise InputError(
            f"the novels' data file holds an R object of type {flags & 0xFF}, not strings; fetch the pinned version"
        )
    offset += 8
    strings = []
    for _ in range(count):
        _, length = struct.unpack_from(">ii", raw, offset)
        offset += 8
        size = max(length, 0)  # -1 is R's missing value
        strings.append(raw[offset : offset + size].decode("utf-8"))
        offset += size
    return strings


_LOADERS: dict[str, Callable[[], list[Document]]] = {
    "wiki": _wiki,
    "novels": _novels,
    "pubmed": _pubmed,
    "stdlib": _stdlib,
}
TEXTS = tuple(_LOADERS)
