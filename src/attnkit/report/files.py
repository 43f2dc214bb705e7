"""Result files: one JSON envelope for every command, written whole or not at all."""

import dataclasses
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnkit._core.errors import InputError, OptionError
from attnkit._core.files import write_bytes, write_text

__all__ = ["envelope", "plain", "read_envelope", "versions", "write_bytes", "write_json", "write_text"]

_PACKAGES = ("torch", "triton", "transformers", "numpy")


def plain(value: Any) -> Any:
    """Turn dataclasses, mappings, sequences, paths and NumPy or torch scalars into JSON; NaN and infinity become null.

    Raises:
        OptionError: a value of a kind that has no JSON form.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return plain(value.item())
    raise OptionError(f"a result holds {type(value).__name__} {value!r}, which has no JSON form; convert it first")


def write_json(path: Path, obj: object) -> None:
    """Write an object as indented JSON, whole or not at all; see `plain` for what is converted."""
    write_text(path, json.dumps(plain(obj), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def versions() -> dict[str, str | None]:
    """Versions of Python and the packages that decide numbers, read without importing them; None where absent."""
    from attnkit import __version__

    found: dict[str, str | None] = {"python": platform.python_version(), "attnkit": __version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def envelope(
    schema: str,
    rows: Sequence[object],
    *,
    command: str,
    seed: int | None,
    device: str,
    dtype: str,
    wall_s: float,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Wrap the rows of a result in what is needed to read and repeat it.

    Args:
        schema: name and version, "attnkit.compare/1".
        rows: mappings or dataclasses.
        command: the command line, or the Python call.
        seed: of everything random; None where nothing is.
        device: what computed, in words ("cpu", "NVIDIA H200").
        dtype: number format of the model or the operands.
        wall_s: wall time, seconds.
        extra: further top-level entries of this schema.
    Raises:
        OptionError: an extra entry has the name of a standard one, or a value has no JSON form.
    """
    standard = {
        "schema": schema,
        "command": command,
        "seed": seed,
        "versions": versions(),
        "device": device,
        "dtype": dtype,
        "wall_s": round(wall_s, 3),
    }
    clash = sorted({*standard, "rows"} & set(extra or {}))
    if clash:
        raise OptionError(f"extra={', '.join(clash)} would replace a standard entry of the envelope; choose other names")
    document = plain({**standard, **(extra or {}), "rows": rows})
    assert isinstance(document, dict)
    return document


def read_envelope(path: Path) -> dict[str, Any]:
    """Read a result file that attnkit has written.

    Raises:
        FileNotFoundError: no such file.
        InputError: not JSON, or JSON without a schema and rows.
    """
    advice = "give a result file that an attnkit command has written"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file; {advice}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON (line {error.lineno}: {error.msg}); {advice}") from error
    if not isinstance(document, dict) or not isinstance(document.get("schema"), str):
        raise InputError(f'{path} names no "schema"; {advice}')
    rows = document.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f'{path} ({document["schema"]}) has no list of "rows"; {advice}')
    return document
