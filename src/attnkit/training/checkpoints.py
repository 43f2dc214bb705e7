"""Checkpoints that are whole: the Trainer writes a folder, a manifest written last says that it is complete."""

import json
import re
from pathlib import Path

from attnkit import report
from attnkit._core.errors import InputError
from attnkit._core.files import sha256

__all__ = ["MANIFEST", "check", "last_complete", "seal"]

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def seal(folder: Path) -> None:
    """Write the manifest of a finished checkpoint: size and SHA-256 of every file."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    report.write_json(folder / MANIFEST, {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files})


def last_complete(out: Path) -> Path | None:
    """The newest sealed checkpoint of a run; folders without a manifest were being written when the run ended.

    Raises:
        InputError: its files are not those that were sealed.
    """
    sealed = [path for path in out.glob("checkpoint-*") if _NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    if not sealed:
        return None
    newest = max(sealed, key=lambda path: int(path.name.rpartition("-")[2]))
    check(newest)
    return newest


def check(folder: Path) -> None:
    """Compare a checkpoint with its manifest.

    Raises:
        InputError: a file is missing or differs; the message names it and says how to go on without this checkpoint.
    """
    advice = f"delete {folder} to go on from an older one"
    try:
        files = json.loads((folder / MANIFEST).read_text("utf-8"))
        sizes = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"checkpoint {folder.name}: {MANIFEST} cannot be read; {advice}") from error
    for name, (size, digest) in sizes.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"checkpoint {folder.name} lacks {name}; {advice}")
        if path.stat().st_size != size or sha256(path) != digest:
            raise InputError(f"checkpoint {folder.name}: {name} is not what was saved; {advice}")
