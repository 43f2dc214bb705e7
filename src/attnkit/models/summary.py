"""What a preset is made of."""

from dataclasses import dataclass

import torch
from torch import nn

from attnkit.models.auto import FAMILIES
from attnkit.models.presets import PRESETS

__all__ = ["LayerSummary", "Summary", "summarise"]


@dataclass(frozen=True)
class LayerSummary:
    """One block.

    Attributes:
        mixer, mlp: its parts, by their registered names.
        cache: what it keeps between calls, or None.
        parameters: how many.
    """

    mixer: str
    mlp: str
    cache: str | None
    parameters: int


@dataclass(frozen=True)
class Summary:
    """A whole model.

    Attributes:
        preset, family: names.
        width, heads, vocabulary: sizes.
        layers: one entry a block.
        parameters: of everything, tied weights once.
        embedding_parameters: of embedding and head.
    """

    preset: str
    family: str
    width: int
    heads: int
    vocabulary: int
    layers: tuple[LayerSummary, ...]
    parameters: int
    embedding_parameters: int


def summarise(preset: str) -> Summary:
    """Count a preset's parameters, without memory for them.

    Args:
        preset: a name in `PRESETS`.
    Raises:
        OptionError: an unknown preset.
    """
    config = PRESETS[preset]()
    head = next(head for configuration, _, _, head in FAMILIES if configuration is type(config))
    with torch.device("meta"):
        model = head(config)
    layers = tuple(
        LayerSummary(spec.name, mlp, None if config.bidirectional else spec.cache_type, _count(model.model.layers[index]))
        for (index, spec), mlp in zip(config.mixers(), config.mlp_types or (), strict=True)
    )
    inner = sum(layer.parameters for layer in layers) + _count(model.model.norm)
    return Summary(
        preset=preset,
        family=config.model_type,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
        layers=layers,
        parameters=_count(model),
        embedding_parameters=_count(model) - inner,
    )


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
