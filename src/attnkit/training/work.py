"""Floating-point operations of training, counted by document, and what a device could do in the time."""

from typing import Any

import torch

from attnkit.training.data.packing import Work

__all__ = ["attention_channels", "counted_parameters", "peak_flops", "training_flops"]

# dense bf16 and TF32-free fp32 peaks, 1e12 operations a second, from the makers' data sheets
_PEAKS = {
    "H100 PCIe": (756, 51),
    "H100": (989, 67),
    "H200": (989, 67),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "RTX 4090": (165, 82.6),
}


def counted_parameters(model: Any) -> int:
    """Parameters that multiply every token: all but the input embedding, unless it is the head's matrix too."""
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    return int(total if tied else total - embedding.weight.numel())


def attention_channels(config: Any) -> int:
    """Layers x heads x head width of the layers whose cost grows with the square of the length."""
    from attnkit.models import MIXERS

    mixers = getattr(config, "mixer_types", None)
    whole = [name for name in mixers or () if MIXERS[name].cache_type == "full_attention"]
    layers = config.num_hidden_layers if mixers is None else len(whole)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(layers * config.num_attention_heads * width)


def training_flops(parameters: int, channels: int, work: Work) -> float:
    """Operations of a forward and a backward pass: 6 N T + 12 C sum(L^2) / 2, the half because attention is causal.

    Args:
        parameters: N, see `counted_parameters`.
        channels: C, see `attention_channels`.
        work: T tokens in sequences of L_i tokens.
    """
    return 6.0 * parameters * work.tokens + 6.0 * channels * work.squares


def peak_flops(device: torch.device, precision: str) -> float | None:
    """What the device's data sheet promises, operations a second; None where it is not known (CPUs, other GPUs)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = next((peaks for part, peaks in _PEAKS.items() if part in name), None)
    return None if found is None else found[0 if precision == "bf16" else 1] * 1e12
