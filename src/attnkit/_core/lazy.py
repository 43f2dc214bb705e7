"""Lazy attributes of namespaces, and optional packages that explain themselves when missing."""

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from attnkit._core.errors import MissingExtra

__all__ = ["lazy_attributes", "require"]


def lazy_attributes(
    package: str, *, modules: Mapping[str, str] | None = None, names: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Build `__getattr__` and `__dir__` of a namespace whose parts load on first use.

    Args:
        package: the namespace's own `__name__`.
        modules: attribute -> module that the attribute is.
        names: attribute -> module that defines an attribute of that name.
    """
    modules, names = dict(modules or {}), dict(names or {})

    def get(name: str) -> Any:
        if name in modules:
            value: Any = importlib.import_module(modules[name])
        elif name in names:
            value = getattr(importlib.import_module(names[name]), name)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    def listing() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules, *names})

    return get, listing


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Raises:
        MissingExtra: the package is not installed; the message is the install line.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if error.name is not None and package != error.name.split(".")[0]:
            raise  # the package is there, something beneath it is broken: do not hide that
        raise MissingExtra(f'{package} is not installed; run: pip install "attnkit[{extra}]"') from None
