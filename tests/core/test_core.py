"""Errors, registries, lazy imports, settings, dispatch."""

import re
import sys
from pathlib import Path

import pytest
import torch

from attnkit import errors
from attnkit._core.checks import check_choice, check_same, dims
from attnkit._core.dispatch import Backend, choose, explain_choice, only_when_named
from attnkit._core.lazy import lazy_attributes, require
from attnkit._core.registry import Registry
from attnkit._core.settings import settings


def test_every_error_has_one_base_and_an_exit_code() -> None:
    for name in errors.__all__:
        error = getattr(errors, name)
        assert issubclass(error, errors.AttnkitError)
        assert error.exit_code in {3, 4, 5, 6}
        assert name in (errors.__doc__ or "")


def test_registry_keeps_order_and_suggests() -> None:
    registry: Registry[int] = Registry("method")
    assert registry.register("window", 1) == 1
    registry.register("dense", 2)
    assert list(registry) == ["window", "dense"]
    assert registry.values() == (1, 2)
    assert len(registry) == 2
    assert "dense" in registry
    with pytest.raises(errors.OptionError, match="unknown method 'windw'; did you mean 'window'\\? known: window, dense"):
        registry["windw"]
    with pytest.raises(errors.OptionError, match="method 'dense' is registered twice"):
        registry.register("dense", 3)


def test_registry_makes_what_is_registered_later_once() -> None:
    registry: Registry[list[int]] = Registry("method")
    made: list[int] = []
    registry.register_later("late", lambda: made.append(1) or made)
    registry.register("plain", [])
    assert "late" in registry
    assert list(registry) == ["late", "plain"]
    assert made == []
    assert registry["late"] is registry["late"] is registry.values()[0]
    assert made == [1]
    with pytest.raises(errors.OptionError, match="method 'late' is registered twice"):
        registry.register_later("late", list)


def test_missing_extra_is_the_install_line() -> None:
    with pytest.raises(
        errors.MissingExtra, match=re.escape('no_such_package is not installed; run: pip install "attnkit[video]"')
    ):
        require("no_such_package.part", extra="video")


def test_a_broken_package_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("import absent_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="absent_dependency"):
        require("half_installed", extra="hf")


def test_lazy_attributes_load_once_and_list_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    import attnkit

    get, listing = lazy_attributes(
        "attnkit", modules={"errors": "attnkit._core.errors"}, names={"Registry": "attnkit._core.registry"}
    )
    assert get("errors") is sys.modules["attnkit._core.errors"]
    assert get("Registry") is Registry
    monkeypatch.delattr(attnkit, "Registry")
    assert {"errors", "Registry"} <= set(listing())
    with pytest.raises(AttributeError, match="module 'attnkit' has no attribute 'nothing'"):
        get("nothing")


def test_settings_read_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTNKIT_DISABLE", "attention.sdpa, merge_partials.torch,")
    monkeypatch.setenv("ATTNKIT_CACHE_DIR", str(tmp_path))
    assert settings().disable == {"attention.sdpa", "merge_partials.torch"}
    assert settings().cache_path() == tmp_path
    monkeypatch.setenv("ATTNKIT_CACHE_DIR", "~/kept")
    assert settings().cache_path() == Path.home() / "kept"
    monkeypatch.delenv("ATTNKIT_CACHE_DIR")
    assert settings().cache_path().name == "attnkit"


BACKENDS = (
    Backend[int]("small", lambda n: n, lambda n: ["too large"] if n > 3 else []),
    Backend[int]("large", lambda n: -n, lambda n: ["too small"] if n < 2 else []),
    Backend[int]("oracle", lambda n: 10 * n, lambda n: [], avoids=only_when_named),
)


def test_auto_takes_the_first_that_can() -> None:
    assert [choose("op", BACKENDS, "auto", n).name for n in (1, 3, 4)] == ["small", "small", "large"]
    assert choose("op", BACKENDS, "oracle", 1).run(1) == 10


def test_refusals_are_reported_in_order() -> None:
    explanation = explain_choice("op", BACKENDS, "auto", 9)
    assert (explanation.chosen, explanation.rejected) == ("large", {"small": ["too large"]})
    with pytest.raises(errors.BackendUnavailable, match="op cannot run this call\\. large: too small"):
        choose("op", BACKENDS, "large", 0)
    nothing = explain_choice("op", BACKENDS[2:], "auto", 1)
    assert nothing.chosen is None
    assert nothing.rejected == {"oracle": ["only runs when named"]}


def test_dims_binds_letters_and_numbers() -> None:
    a, b = torch.zeros(2, 3), torch.zeros(3, 5)
    assert dims(a=(a, "B T"), b=(b, "T 5")) == {"B": 2, "T": 3}
    with pytest.raises(errors.ShapeError, match=re.escape("b has shape (3, 5) for [T, 4]; 4 must be 4")):
        dims(b=(b, "T 4"))


def test_devices_and_choices() -> None:
    with pytest.raises(errors.InputError, match="k is on meta but q is on cpu; move one of them"):
        check_same(q=torch.zeros(1), k=torch.zeros(1, device="meta"))
    with pytest.raises(errors.OptionError, match="mode='x' is not allowed; choose one of 'a', 'b'"):
        check_choice("mode", "x", ("a", "b"))
