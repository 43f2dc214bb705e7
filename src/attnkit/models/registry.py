"""Mixers and feed-forward parts by name, and what the stack must know about a mixer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from attnkit._core.checks import check_choice
from attnkit._core.registry import Registry
from attnkit.modules.mixing import Shared

__all__ = ["CACHE_TYPES", "MIXERS", "MLPS", "MixerSpec", "mixer"]

CACHE_TYPES = ("full_attention", "sliding_attention", "linear_attention", None)

B = TypeVar("B", bound=Callable[[Any, int], nn.Module])


@dataclass(frozen=True)
class MixerSpec:
    """A mixer that models can name in `mixer_types`.

    What a mixer does not declare is refused by name: a mixer that overlooks boundaries or padding would compute wrong
    numbers in silence.

    Attributes:
        name: as written in `mixer_types`.
        build: (config, layer_idx) -> the module, often its class.
        cache_type: what it keeps between calls, in transformers' words: "full_attention" and "sliding_attention" (keys
            and values), "linear_attention" (a state), or None: nothing, since each token is mixed on its own.
        needs_rope: it reads `context.rope`.
        produces, consumes: fields of `attnkit.modules.Shared` that it fills in, and that an earlier layer must fill in.
        bidirectional: it can run with `context.causal == False`.
        packing: it keeps to `context.cu_seqlens`.
        padding: it keeps to `context.padding`.
    Raises:
        OptionError: an unknown cache type or field.
    """

    name: str
    build: Callable[[Any, int], nn.Module]
    cache_type: str | None
    needs_rope: bool = False
    produces: tuple[str, ...] = ()
    consumes: tuple[str, ...] = ()
    bidirectional: bool = False
    packing: bool = False
    padding: bool = False

    def __post_init__(self) -> None:
        check_choice("cache_type", self.cache_type, CACHE_TYPES)
        for argument in ("produces", "consumes"):
            for field in getattr(self, argument):
                check_choice(argument, field, Shared._fields)


MIXERS: Registry[MixerSpec] = Registry("mixer")
MLPS: Registry[Callable[[Any, int], nn.Module] | None] = Registry("mlp")  # (config, layer_idx) -> module; None: no such part


def mixer(
    name: str,
    *,
    cache_type: str | None,
    needs_rope: bool = False,
    produces: tuple[str, ...] = (),
    consumes: tuple[str, ...] = (),
    bidirectional: bool = False,
    packing: bool = False,
    padding: bool = False,
) -> Callable[[B], B]:
    """Register a mixer: a class whose constructor takes (config, layer_idx), or a function that returns a module.

    Args:
        name: for `mixer_types`.
        cache_type, needs_rope, produces, consumes, bidirectional, packing, padding: see `MixerSpec`.
    Raises:
        OptionError: the name is taken, or an argument is unknown.
    """

    def register(build: B) -> B:
        spec = MixerSpec(
            name, build, cache_type, needs_rope, produces, consumes,
            bidirectional=bidirectional, packing=packing, padding=padding,
        )  # fmt: skip
        MIXERS.register(name, spec)
        return build

    return register
