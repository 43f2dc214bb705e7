from collections import Counter

import pytest

from attnkit import kv
from attnkit._core.errors import OptionError
from attnkit.inference import Dense, Policy, Window, YaRN
from attnkit.lab.compare.methods import BASELINE, METHODS, describe, select
from attnkit.lab.compare.plan import inputs, order
from attnkit.lab.compare.prompts import DEPTHS


def test_every_method_reads_every_input_once() -> None:
    methods = select(("all",))
    for item in inputs([128, 256], trials=3):
        assert sorted(method.name for method in order(item, methods)) == sorted(
            [*METHODS, *(f"{name}@0.5" for name in kv.methods(ready=True))]
        )


def test_on_pass_keys_every_method_takes_every_turn_equally_often() -> None:
    methods = select(("all",))
    items = inputs([128], trials=len(methods))
    turns = Counter(
        (turn, method.name) for item in items if item.depth is not None for turn, method in enumerate(order(item, methods))
    )
    assert set(turns.values()) == {len(DEPTHS)}


def test_on_text_the_baseline_comes_first_and_the_others_rotate() -> None:
    methods = select(("all",))
    orders = [[method.name for method in order(item, methods)] for item in inputs([128], trials=4) if item.depth is None]
    assert {names[0] for names in orders} == {BASELINE}
    assert len({tuple(names) for names in orders}) == 4


def test_inputs_are_texts_and_keys_at_each_depth() -> None:
    items = inputs([128, 256], trials=2)
    assert [item.turn for item in items if item.depth is None] == list(range(4))
    assert [item.turn for item in items if item.depth is not None] == list(range(12))
    assert Counter(item.depth for item in items) == dict.fromkeys((None, *DEPTHS), 4)
    assert len({str(item) for item in items}) == 16


def test_the_default_list_is_short_and_begins_with_the_baseline() -> None:
    default = select(None)
    assert default[0].name == BASELINE
    assert len(default) <= 8
    assert default == tuple(method for method in METHODS.values() if method.default)


def test_the_baseline_is_added_once() -> None:
    assert [method.name for method in select(["yarn", "window", "yarn"])] == ["dense", "yarn", "window"]
    assert [method.name for method in select(["dense"])] == ["dense"]


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="unknown method 'windw'; did you mean 'window'"):
        select(["windw"])


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_windows_follow_the_length(method: object) -> None:
    prefill = METHODS[method.name].policy(2048).prefill  # type: ignore[attr-defined]
    assert isinstance(prefill, Dense) or prefill.window == 512


def test_describe_leaves_out_what_is_off() -> None:
    assert describe(Policy()) == "Dense()"
    assert describe(Policy(prefill=Window(window=8))) == "Window(window=8, sink=4)"
    both = Policy(prefill=Window(window=8, rerotate=True), position=YaRN(factor=4.0))
    assert describe(both) == "Window(window=8, sink=4, rerotate=True) + YaRN(factor=4.0, beta_fast=32.0, beta_slow=1.0)"
