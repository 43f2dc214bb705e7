"""Texts as packed rows: token cache, split by document, exact borders."""

from attnkit.training.data.cache import TokenStore, open_store
from attnkit.training.data.packing import IGNORED, PackedRows, Row, Work, pack
from attnkit.training.data.text import TextData, load_text_data, split_documents

__all__ = [
    "IGNORED",
    "PackedRows",
    "Row",
    "TextData",
    "TokenStore",
    "Work",
    "load_text_data",
    "open_store",
    "pack",
    "split_documents",
]
