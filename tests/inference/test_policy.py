import json
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from oracles import prompt

from attnkit import inference, kv
from attnkit._core.errors import OptionError, PolicyError
from attnkit.inference import (
    CORRECTIONS,
    NTK,
    PI,
    POSITIONS,
    PREFILLS,
    Dense,
    Hashed,
    Policy,
    Window,
    YaRN,
    apply,
    available,
)
from attnkit.testing import tiny_model


@dataclass(frozen=True)
class Doubled:
    """A correction for tests: twice what the prefill gives."""

    name: ClassVar[str] = "doubled"

    def attend(self, call, prefill):
        return 2 * prefill.attend(call)


@dataclass(frozen=True)
class Even:
    """A scorer for tests: every other token is worth nothing."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def score(self, ctx):
        return (ctx.rank % 2 == 0).float().expand(ctx.stored.shape)


@pytest.fixture(autouse=True)
def extended(monkeypatch):
    monkeypatch.setitem(CORRECTIONS._values, "doubled", Doubled)


def test_names_and_objects_are_the_same_thing():
    assert Policy() == Policy(prefill="dense") == Policy(prefill=Dense())
    assert Policy(prefill="window", position="yarn") == Policy(prefill=Window(), position=YaRN())
    assert Policy(prefill=Window(window=5)) != Policy(prefill="window")
    assert len({Policy(), Policy(prefill="dense"), Policy(position="pi")}) == 2


def test_registries_hold_what_a_policy_takes():
    assert list(PREFILLS) == ["dense", "window", "hash"]
    assert list(POSITIONS) == ["pi", "ntk", "yarn"]
    assert [type(PREFILLS[name]()) for name in PREFILLS] == [Dense, Window, Hashed]
    assert [type(POSITIONS[name]()) for name in POSITIONS] == [PI, NTK, YaRN]


def test_public_names_stay_what_they_are_when_every_module_is_imported():
    code = (
        "import importlib, pkgutil, types; from attnkit import inference; "
        "[importlib.import_module(f'attnkit.inference.{each.name}') for each in pkgutil.iter_modules(inference.__path__)]; "
        "print([name for name in inference.__all__ if isinstance(getattr(inference, name), types.ModuleType)])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_available_names_can_be_applied():
    model, ids = tiny_model("llama"), prompt(1, 8)
    assert available()[:6] == ("dense", "window", "hash", "pi", "ntk", "yarn")
    assert set(available()[6:]) <= set(kv.methods())
    assert {"knorm", "streaming_llm"} <= set(available())
    for name in available():
        with torch.no_grad(), apply(model, name) as h:
            model(ids, past_key_values=h.new_cache())
            assert name in json.dumps(h.policy.to_dict())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: Policy(prefill="windw"),
            OptionError,
            "unknown prefill method 'windw'; did you mean 'window'\\? known: dense, window, hash",
        ),
        (lambda: Policy(position="rope"), OptionError, "unknown position method 'rope'; known: pi, ntk, yarn"),
        (lambda: Policy(correction="delta"), OptionError, "unknown correction 'delta'; known: doubled"),
        (lambda: Policy(cache="knrm"), OptionError, "unknown cache method 'knrm'; did you mean 'knorm'"),
        (lambda: Policy(cache="adkv:knorm"), OptionError, "unknown wrapper of cache methods 'adkv'; did you mean 'adakv'"),
        (lambda: Policy(cache=Even()), PolicyError, r"cache=Even\(\) is not a press; make one with attnkit.kv.press"),
        (lambda: Policy(cache=kv.Press(scorer=Even())).to_dict(), PolicyError, "was put together by hand"),
        (
            lambda: Policy(prefill=None),
            PolicyError,
            "prefill=None is not a registered prefill method; known: dense, window, hash",
        ),
        (lambda: Policy(prefill=YaRN()), PolicyError, r"prefill=YaRN\(.*\) is not a registered prefill method"),
        (lambda: Policy(position=2.0), PolicyError, "position=2.0 is not a registered position method; known: pi, ntk, yarn"),
        (lambda: Policy(correction="doubled"), PolicyError, "a correction repairs a sparse prefill, and this one is dense"),
        (
            lambda: Policy(prefill="window", cache="knorm"),
            PolicyError,
            "one method drops keys, not the prefill and the cache",
        ),
        (lambda: apply(tiny_model("llama"), "widow"), OptionError, "unknown policy 'widow'; did you mean 'window'"),
        (lambda: apply(tiny_model("llama"), "doubled"), OptionError, "unknown policy 'doubled'"),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_an_object_of_an_unregistered_class_is_refused():
    @dataclass(frozen=True)
    class Impostor:
        name: ClassVar[str] = "window"

    with pytest.raises(PolicyError, match="is not a registered prefill method"):
        Policy(prefill=Impostor())


@pytest.mark.parametrize(
    "policy",
    [
        Policy(),
        Policy(prefill=Window(window=7, sink=0, rerotate=True), position=YaRN(factor=3.5, beta_fast=16)),
        Policy(prefill=Window(dense_prefill=True), position=NTK(factor=4)),
        Policy(prefill=Hashed(num_buckets=4, rounds=3)),
        Policy(cache=kv.press("adakv:streaming_llm", ratio=0.25, alpha=0.1, sink=2)),
        Policy(cache="knorm+decode:random"),
    ],
)
def test_policies_survive_a_file(policy, tmp_path):
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(policy.to_dict()))
    assert Policy.from_dict(json.loads(path.read_text())) == policy


def test_the_written_form():
    assert Policy(prefill=Window(window=7), position="pi").to_dict() == {
        "schema": "attnkit.policy/1",
        "prefill": {"name": "window", "window": 7, "sink": 4, "rerotate": False, "dense_prefill": False},
        "position": {"name": "pi", "factor": 2.0},
        "correction": None,
        "cache": None,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"schema": "attnkit.policy/9"},
            "schema='attnkit.policy/9' is not a policy of this version; expected 'attnkit.policy/1'",
        ),
        ({"decoding": {"name": "x"}}, "a policy has no 'decoding'; it has prefill, position, correction, cache"),
        ({"prefill": {"name": "windo"}}, "unknown prefill method 'windo'; did you mean 'window'"),
        ({"prefill": {"window": 3}}, "unknown prefill method ''"),
        (
            {"prefill": {"name": "window", "size": 3}},
            "prefill 'window' has no option 'size'; it has window, sink, rerotate, dense_prefill",
        ),
        ({"prefill": {"name": "window", "window": 0}}, "window=0 is not allowed"),
    ],
)
def test_files_that_are_no_policies(change, message):
    with pytest.raises(OptionError, match=message):
        Policy.from_dict({**Policy().to_dict(), **change})


def test_a_correction_gets_the_layer_and_the_prefill():
    model, ids = tiny_model("gemma3"), prompt(1, 30)
    seen = {}
    for layer in model.model.layers[:2]:
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda module, args: seen.setdefault(module, []).append(args[0]), prepend=True
        )
    policies = (Policy(prefill=Window(window=3, sink=1)), Policy(prefill=Window(window=3, sink=1), correction="doubled"))
    with torch.no_grad():
        for policy in policies:
            with apply(model, policy):
                model(ids)
    local, full = seen.values()
    assert torch.equal(*local)
    assert torch.equal(2 * full[0], full[1])


def test_a_cache_method_gets_the_layers_that_know_positions():
    model, ids = tiny_model("gemma3"), prompt(2, 9)
    with torch.no_grad(), apply(model, Policy(cache=kv.Press(scorer=Even(), ratio=0.4))) as h:
        cache = h.new_cache()
        model(ids, past_key_values=cache)
        assert [getattr(layer, "stored", None) for layer in cache.layers] == [None, 5, 5]
        view = cache.layers[1].view()
        assert view.positions[view.real].tolist() == [0, 2, 4, 6, 8] * 2 * 2
        model(ids)  # a cache of its own kind has nothing to thin out


def test_policies_are_made_without_transformers():
    code = "import sys; from attnkit.inference import Policy; Policy(prefill='window', position='yarn'); print([*sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'transformers'" not in run.stdout


def test_without_transformers_the_install_line_is_the_message():
    code = """
import sys
sys.modules["transformers"] = None
import attnkit
for package, name in ((attnkit.inference, "apply"), (attnkit.kv, "KVCache"), (attnkit.kv, "KVLayer")):
    try:
        getattr(package, name)
    except attnkit.errors.MissingExtra as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == 3 * 'transformers is not installed; run: pip install "attnkit[hf]"\n'


def test_every_public_name_is_there():
    for name in inference.__all__:
        assert getattr(inference, name) is not None
    assert set(inference.__all__) <= set(dir(inference))
    assert callable(inference.apply)
