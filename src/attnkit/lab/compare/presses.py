"""Presses of the cache: a grid of ratios, and what their caches weigh."""

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from attnkit import inference, report
from attnkit._core.devices import device_name
from attnkit._core.errors import InputError, OptionError
from attnkit._core.events import Event
from attnkit.inference.answers import read
from attnkit.lab.compare import loading, texts
from attnkit.lab.compare.kept import kept_of
from attnkit.lab.compare.loading import LoadedModel
from attnkit.lab.compare.measure import MIB, PeakMemory
from attnkit.lab.compare.methods import BASELINE, Method, named
from attnkit.lab.compare.runner import placement, run
from attnkit.report import cache_memory
from attnkit.report.presses import save

__all__ = ["grid", "memory", "sweep"]

SCHEMA = "attnkit.kv.memory/1"


def grid(presses: Sequence[str], ratios: Sequence[float], codec: str | None = None) -> tuple[str, ...]:
    """The names of all presses at all ratios, as `attnkit.lab.compare.run` takes them.

    Args:
        presses: without a ratio; "adakv:snapkv:window=32".
        ratios: fractions to remove; 0 is dense, in the codec.
        codec: of all of them.
    Raises:
        OptionError: a press has a ratio of its own, or is unknown.

    >>> grid(["knorm"], [0.0, 0.5], codec="int8")
    ('dense:codec=int8', 'knorm:codec=int8@0.5')
    """
    ending = f":codec={codec}" if codec else ""
    names = [BASELINE + ending] if 0 in ratios else []
    for press in presses:
        if "@" in press:
            raise OptionError(f"press {press!r} has a ratio of its own; name the press alone and give ratios beside it")
        names += [named(f"{press}{ending}@{ratio:g}").name for ratio in ratios if ratio]
    return tuple(dict.fromkeys(names))


def sweep(
    *, presses: Sequence[str], ratios: Sequence[float], codec: str | None = None, out: Path | None = None, **options: Any
) -> dict[str, Any]:
    """Compare presses over a grid of ratios: `attnkit.lab.compare.run` with `grid`, plus a table and a picture.

    Args:
        presses, ratios, codec: see `grid`.
        out: folder for what `run` writes, results.csv and, where matplotlib is installed, curves.png.
        options: of `run`.
    Returns:
        the envelope of attnkit.compare/1.
    Raises:
        AttnkitError: see `run`.
    """
    document = run(methods=grid(presses, ratios, codec), out=out, **options)
    if out is not None:
        save(out, document)
    return document


@torch.inference_mode()
def memory(
    *,
    model: str | Path | LoadedModel = loading.PACKAGED,
    text: str = "wiki",
    length: int = 2048,
    methods: Sequence[str] = ("snapkv",),
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    out: Path | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    command: str | None = None,
) -> dict[str, Any]:
    """What the cache weighs after one context, for every method: measured, next to what the ratio promises and to dense.

    Args:
        model, text, device, dtype, command: see `attnkit.lab.compare.run`.
        length: of the context in tokens.
        methods: presses and methods as `run` takes them; dense always comes first.
        out: folder for results.json, index.html and, where matplotlib is installed, memory.png; None writes nothing.
        on_event: called before the first method and after each.
    Returns:
        the envelope of attnkit.kv.memory/1. Rows: method, ratio, tokens (mean share of the context that a head stores, None
        where nothing is pressed), kv_mib (of all tensors of the cache), of_dense, held_mib (what the allocator says is in
        use after the pass beyond before, notes of the press included) and peak_mib (the largest such in the pass).
    Raises:
        AttnkitError: see `run`.
    """
    place, number = placement(model, device, dtype)
    chosen = {method.name: method for method in map(named, [BASELINE, *methods])}
    source = model if isinstance(model, LoadedModel) else loading.locate(model)
    began, words = time.perf_counter(), texts.read(text)
    on_event(Event("phase", f"loading {source.name}", 0, len(chosen)))
    loaded = source if isinstance(source, LoadedModel) else loading.load(source, place, number)
    ids = texts.tokenize(words, loaded.tokenizer, lengths=[length], trials=1)[:length]
    on_event(Event("plan", f"{len(chosen)} methods", 0, len(chosen)))
    rows: list[dict[str, Any]] = []
    for done, method in enumerate(chosen.values()):
        rows.append(_weighed(loaded, method, ids))
        rows[-1]["of_dense"] = rows[-1]["kv_mib"] / rows[0]["kv_mib"]
        on_event(Event("step", method.name, done + 1, len(chosen)))
    document = report.envelope(
        SCHEMA,
        rows,
        command=command or f"attnkit.lab.compare.memory(length={length}, methods={list(methods)})",
        seed=None,
        device=device_name(place),
        dtype=str(number).removeprefix("torch."),
        wall_s=time.perf_counter() - began,
        extra={"model": source.name, "text": words.name, "length": length},
    )
    if out is not None:
        report.write_json(out / "results.json", document)
        report.write_html(out / "index.html", [document])
        cache_memory.save(out, document)
    return document


def _weighed(loaded: LoadedModel, method: Method, ids: list[int]) -> dict[str, Any]:
    with inference.apply(loaded.model, method.policy(len(ids))) as applied:
        read(loaded.model, ids, applied.new_cache(codec=method.codec), last=True)  # kernels are chosen in a first call
        gc.collect()
        with PeakMemory(loaded.model.device) as peak:
            cache = applied.new_cache(codec=method.codec)
            read(loaded.model, ids, cache, last=True)
        kept = None if method.press is None else kept_of(cache)["heads"]
    shares = [share for layer in kept or () for share in layer]
    if kept is not None and not shares:
        raise InputError(f"{loaded.name} has no full-attention layer whose cache could be compressed")
    return {
        "method": method.name,
        "ratio": method.ratio,
        "tokens": sum(shares) / len(shares) if shares else None,
        "kv_mib": cache.nbytes() / MIB,
        "held_mib": peak.held_mib,
        "peak_mib": peak.mib,
    }
