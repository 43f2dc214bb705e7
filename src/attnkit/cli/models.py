"""`attnkit models`: presets, what a model is made of, and whether ours are transformers' Llama and xLSTM."""

import dataclasses
from typing import Any

import click

from attnkit._core.errors import CheckFailed
from attnkit.cli._common import device_option, emit, json_option, resolve_device, seed_option, verb


@verb(
    "list",
    examples=("attnkit models list", "attnkit models list --json"),
    python="from attnkit.models import MIXERS, MLPS, PRESETS\nlist(PRESETS), list(MIXERS), list(MLPS)",
)
@json_option
def _list(as_json: bool) -> None:
    """List the presets, and the mixers and feed-forward parts that a configuration can name."""
    from attnkit.models import MIXERS, MLPS, PRESETS, summarise
    from attnkit.report import table

    presets = [summarise(name) for name in PRESETS]
    shown = table(
        ("preset", "family", "layers", "width", "heads", "vocabulary", "parameters"),
        [(s.preset, s.family, len(s.layers), s.width, s.heads, s.vocabulary, f"{s.parameters:,}") for s in presets],
    )
    parts = f"mixers: {', '.join(MIXERS)}; mlps: {', '.join(MLPS)}"
    emit(
        {"presets": presets, "mixers": list(MIXERS), "mlps": list(MLPS)},
        as_json,
        shown,
        parts,
        "More: attnkit models show NAME",
    )


@verb(
    "show",
    examples=("attnkit models show decoder-50m", "attnkit models show decoder-tiny --json"),
    python='from attnkit.models import PRESETS, summarise\nsummarise("decoder-50m"), PRESETS["decoder-50m"]()',
)
@click.argument("name")
@json_option
def _show(name: str, as_json: bool) -> None:
    """Show one preset: its layers, what each keeps in the cache, and its parameters."""
    from attnkit.models import summarise
    from attnkit.report import table

    summary = summarise(name)
    rows = [
        (index, layer.mixer, layer.mlp, layer.cache or "nothing", f"{layer.parameters:,}")
        for index, layer in enumerate(summary.layers)
    ]
    title = f"{name} ({summary.family}): width {summary.width}, {summary.heads} heads, vocabulary {summary.vocabulary:,}"
    total = f"{summary.parameters:,} parameters, {summary.embedding_parameters:,} of them in embedding and head"
    shown = table(("layer", "mixer", "mlp", "cache", "parameters"), rows, title=title)
    emit(dataclasses.asdict(summary), as_json, shown, total)


@verb(
    "parity",
    examples=("attnkit models parity --model smollm2", "attnkit models parity --model random-xlstm"),
    python="from attnkit.models import parity, xlstm_parity\nparity(llama).ok, xlstm_parity(xlstm).ok",
    memory_hint="use a smaller model; both are held in fp32",
)
@click.option(
    "--model", default="random", show_default=True, metavar="random|random-xlstm|smollm2|DIR|GGUF",
    help="Whose weights to compare.",
)  # fmt: skip
@device_option
@seed_option
@json_option
def _parity(model: str, device: str, seed: int, as_json: bool) -> None:
    """Compare our decoder with transformers' Llama, or our xLSTM with its xLSTM: same weights, random tokens, float32.

    Ends with exit code 6 where a logit differs by more than 1e-5 of the largest one.
    """
    import torch

    from attnkit.models import parity, xlstm_parity
    from attnkit.report import table

    where = resolve_device(device)
    theirs = _theirs(model, where, torch.float32, seed)
    found = (xlstm_parity if theirs.config.model_type == "xlstm" else parity)(theirs, seed=seed)
    result = {
        "model": model,
        "parameters": found.parameters,
        "largest_logit": found.largest_logit,
        "max_difference": found.max_difference,
        "allowed": found.allowed,
        "ok": found.ok,
    }
    verdict = "pass" if found.ok else "FAIL"
    numbers = (f"{found.parameters:,}", f"{found.largest_logit:.3g}", f"{found.max_difference:.1e}", f"{found.allowed:.1e}")
    headers = ("model", "parameters", "largest logit", "max difference", "allowed", "verdict")
    emit(result, as_json, table(headers, [(model, *numbers, verdict)]))
    if not found.ok:
        raise CheckFailed(
            f"logits differ by {found.max_difference:.1e}, more than {found.allowed:.1e}; on a GPU, see whether TF32 is on"
        )


def _theirs(model: str, device: Any, dtype: Any, seed: int) -> Any:
    """The model to compare with: a small random one, or one from this machine."""
    from attnkit.models import random_llama, random_xlstm

    small = {"random": random_llama, "random-xlstm": random_xlstm}
    if model in small:
        return small[model](seed).to(device, dtype)
    from attnkit.lab.compare.loading import load, locate

    return load(locate(model), device, dtype).model


command = click.Group(
    "models",
    commands=[_list, _show, _parity],
    help="Models on our stack: presets, layers, sizes, and parity with Llama and xLSTM.",
)
