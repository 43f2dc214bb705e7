"""NVIDIA's kvpress 0.5.5 as a judge: its classes, called on tensors of a tiny Llama.

`make` installs it beside the environment, in .venv/peers, because it asks for an older transformers than ours. What it
imports and its scores do not use (data sets, a command line, caches of requests) is replaced by empty modules.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from attnkit.kv.context import ScoreContext

__all__ = ["peer", "peer_kwargs", "peer_scores"]

FOLDER = Path(__file__).parents[2] / ".venv" / "peers"
UNUSED = ("cachetools", "datasets", "fire", "peft", "requests", "tqdm")


class _Anything(types.ModuleType):
    """A module whose every name is a decorator and a class at once."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Whatever


class _Whatever:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __call__(self, function: Any) -> Any:
        return function


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        del path, target
        return importlib.machinery.ModuleSpec(fullname, self) if fullname.split(".")[0] in UNUSED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        del module


@contextmanager
def _stubs() -> Iterator[None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    # whatever is missing here comes last on the path of finders, so what is installed is used
    finder, folder, before = _Finder(), str(FOLDER), set(sys.modules)
    kept, own = dict(functions._global_mapping), dict(functions._local_mapping)
    sys.meta_path.append(finder)
    sys.path.insert(0, folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.path.remove(folder)
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if isinstance(sys.modules[name], _Anything):
                del sys.modules[name]
        # on import the peer wraps every attention function of the process; other tests must not see that
        functions._global_mapping.clear()
        functions._global_mapping.update(kept)
        functions._local_mapping.clear()
        functions._local_mapping.update(own)


@cache
def _load() -> Any:
    with _stubs():
        return importlib.import_module("kvpress")


def peer() -> Any:
    """The package; the test is skipped where it is not installed."""
    if not (FOLDER / "kvpress").is_dir():
        pytest.skip("kvpress is not installed; run: make .venv/.peers")
    return _load()


def peer_kwargs(module: Any, length: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What a Llama layer is called with besides hidden states, as far as the peer looks at it."""
    positions = torch.arange(length)[None]
    return {
        "position_embeddings": module.rotary_emb(torch.zeros(1, dtype=dtype), positions),
        "cache_position": positions[0],
    }


def peer_scores(press: Any, ctx: ScoreContext, attentions: Tensor | None = None) -> Tensor:
    """The peer's scores [B, Hkv, S] for a prefill of `ctx.hidden`."""
    keys, values = ctx.stored.keys.clone(), ctx.stored.values.clone()
    kwargs = peer_kwargs(ctx.module, keys.shape[2], keys.dtype)
    with torch.no_grad():
        scores: Tensor = press.score(ctx.module, ctx.hidden, keys, values, attentions, kwargs)
    return scores.float()
