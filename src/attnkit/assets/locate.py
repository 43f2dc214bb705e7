"""Finding asset files where package managers put them, without importing the packages that carry them."""

import contextlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

from attnkit._core.errors import MissingAsset, OptionError
from attnkit._core.files import sha256
from attnkit._core.settings import settings
from attnkit.assets.catalogue import ASSETS, Asset, Package

__all__ = ["FileState", "fetch_line", "find", "installed", "unpack_folder", "verify"]


@dataclass(frozen=True)
class FileState:
    """What `verify` found out about one file.

    Attributes:
        key: the asset.
        package: the package that carries the file.
        file: its catalogued path.
        path: where it lies, or None.
        state: "ok", "missing" or "differs" (from the pinned SHA-256).
    """

    key: str
    package: str
    file: str
    path: Path | None
    state: str


def fetch_line(key: str) -> str:
    """The command that installs an asset."""
    return f"attnkit assets fetch {key} --run"


def unpack_folder(package: Package) -> Path:
    """Where attnkit unpacks a package that is not installed system-wide; files carried there by hand are found too."""
    return settings().cache_path() / "assets" / package.manager / package.name


def find(key: str, file: str) -> Path:
    """Return the path of a catalogued file.

    Args:
        key: an asset ("lm").
        file: the file's catalogued path, or its last part ("digits.csv.gz").
    Raises:
        OptionError: an unknown asset, or a file that it does not list.
        MissingAsset: the file is not on this machine; the message ends with the fetch line.
    """
    asset = ASSETS[key]
    for package in asset.packages:
        for name in package.files:
            if file in (name, name.rpartition("/")[2]):
                path = _locate(package, name)
                if path is None:
                    raise MissingAsset(f"{key} ({package.name} {package.version}) is not installed; run: {fetch_line(key)}")
                return path
    names = ", ".join(name.rpartition("/")[2] for package in asset.packages for name in package.files)
    raise OptionError(f"asset {key!r} has no file {file!r}; it lists {names}")


def installed(key: str) -> bool:
    """Whether every catalogued file of an asset lies on this machine.

    Raises:
        OptionError: an unknown asset.
    """
    return all(_locate(package, name) is not None for package in ASSETS[key].packages for name in package.files)


def verify(asset: Asset) -> list[FileState]:
    """Compare every catalogued file of an asset with its pinned SHA-256."""
    states = []
    for package in asset.packages:
        for name, digest in package.files.items():
            path = _locate(package, name)
            state = "missing" if path is None else "ok" if sha256(path) == digest else "differs"
            states.append(FileState(asset.key, package.name, name, path, state))
    return states


def _locate(package: Package, name: str) -> Path | None:
    candidates = [unpack_folder(package) / name]
    if package.manager == "pip":
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            candidates.append(Path(str(importlib.metadata.distribution(package.name).locate_file(name))))
    elif package.manager == "apt":
        candidates.append(Path("/") / name)
    return next((path for path in candidates if path.is_file()), None)
