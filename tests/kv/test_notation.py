"""Presses in one word, and the words about them."""

import subprocess
import sys

import pytest

from attnkit import inference, kv
from attnkit._core.errors import OptionError
from attnkit.kv.registry import BASES, WRAPPERS


@pytest.mark.parametrize(
    ("text", "made", "written"),
    [
        ("knorm", kv.press("knorm"), "knorm@0.5"),
        ("snapkv@0.25", kv.press("snapkv", ratio=0.25), "snapkv@0.25"),
        (
            "adakv:snapkv:window=32:alpha=0.1@.75",
            kv.press("adakv:snapkv", ratio=0.75, window=32, alpha=0.1),
            "adakv:snapkv:alpha=0.1:window=32@0.75",
        ),
        (
            "snapkv:window=8+decode:tova:target=64@0.5",
            kv.Chain((kv.press("snapkv", window=8), kv.press("decode:tova", target=64))),
            "snapkv:window=8+decode:tova:target=64@0.5",
        ),
        ("per_layer:knorm:ratios=[0.1,0.2]", kv.press("per_layer:knorm", ratios=[0.1, 0.2]), None),
        ("cur:leverage=key", kv.press("cur", leverage="key"), "cur:leverage=key@0.5"),
    ],
)
def test_a_word_makes_a_press_and_the_press_the_word(text, made, written):
    press = kv.parse(text)
    assert press == made
    assert press.to_dict() == made.to_dict()
    assert kv.parse(kv.write(press)) == press
    if written is not None:
        assert kv.write(press) == written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("knrm", "unknown cache method 'knrm'; did you mean 'knorm'"),
        ("adkv:knorm", "unknown wrapper of cache methods 'adkv'; did you mean 'adakv'"),
        ("knorm:window=3", "'knorm' has no option 'window'"),
        ("knorm@half", "'half' is no ratio; write NAME@0.25"),
        ("knorm@1", "ratio=1.0 is not allowed"),
        ("qfilter", "qfilter"),
    ],
)
def test_what_cannot_be_made_says_why(text, message):
    with pytest.raises(OptionError, match=message):
        kv.parse(text)


@pytest.mark.parametrize(
    "first", ["attnkit.kv", "attnkit.kv.scorers.replay", "attnkit.kv.compat", "attnkit.lab.compare.methods"]
)
def test_the_order_of_names_does_not_depend_on_what_was_imported_first(first):
    code = (
        f"import {first}; from attnkit import inference, kv; "
        "print(kv.methods(), inference.available(), [each.name for each in kv.catalogue.wrappers()], sep='\\n')"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    names = (kv.methods(), inference.available(), [each.name for each in kv.catalogue.wrappers()])
    assert told.splitlines() == [str(each) for each in names]
    assert list(kv.methods()) == sorted(kv.methods())


def test_the_catalogue_says_something_of_every_method():
    bases, wrappers = kv.catalogue.bases(), kv.catalogue.wrappers()
    assert [each.name for each in bases] == sorted(BASES) == list(kv.methods())
    assert [each.name for each in wrappers] == sorted(WRAPPERS)
    assert all(each.summary.endswith(".") for each in (*bases, *wrappers))
    assert [each.name for each in bases if not each.source] == ["random"]
    files = {each.name: each.needs for each in bases if any("FILE" in need for need in each.needs)}
    assert set(files) == set(kv.methods()) - set(kv.methods(ready=True))
    assert files["qfilter"] == ("filters=FILE",)
    assert "second reading" in next(each.needs for each in bases if each.name == "kvzip")
