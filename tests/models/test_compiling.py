"""Blocks of one kind share a graph, whatever differs from layer to layer: torch.compile gives up after eight of them."""

from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers.modeling_layers import GradientCheckpointingLayer

from attnkit import ops
from attnkit.models import MIXERS, AttnkitDecoderConfig, AttnkitDecoderForCausalLM
from attnkit.modules import LightningAttention, RandomDrop
from attnkit.modules.selection import Redrawn

LAYERS = 3


def _unwrapped(build: Any) -> Any:
    return build.func if isinstance(build, partial) else build


# what other tests have registered is theirs
MIXED = sorted(name for name in MIXERS if _unwrapped(MIXERS[name].build).__module__.startswith("attnkit."))


def test_what_differs_from_layer_to_layer_survives_the_meta_device_and_other_dtypes() -> None:
    """Models of transformers are made without memory, and filled from files that do not have it."""
    with torch.device("meta"):
        layers = [LightningAttention(32, 4, layer_idx=i, num_layers=LAYERS) for i in range(LAYERS)]
        drops = [RandomDrop(0.5, seed=i) for i in (-1, 7)]
    for i, layer in enumerate(layers):
        assert torch.equal(layer.to_empty(device="cpu").bfloat16().slopes, ops.lightning_slopes(4, i, LAYERS))
    assert [int(drop.to_empty(device="cpu").seed) for drop in drops] == [2**32 - 1, 7]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own, which it means to hide
@pytest.mark.parametrize("mixer", MIXED)
def test_layers_of_one_mixer_are_compiled_once(mixer: str) -> None:
    config = AttnkitDecoderConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=2,
        mixer_types=[mixer] * LAYERS, sliding_window=8 if mixer.startswith("sliding") else None,
    )  # fmt: skip
    model = AttnkitDecoderForCausalLM(config)
    ids = torch.randint(32, (2, 20), generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = CompileCounter()
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(blocks) == LAYERS
    plain = model(input_ids=ids, labels=ids, use_cache=False).loss
    for block in blocks:
        block.compile(backend=counter)
    for step in range(2):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if step == 0:
            torch.testing.assert_close(loss, plain)
        for module in model.modules():
            if isinstance(module, Redrawn):
                module.advance()
    assert counter.frame_count == 1
    assert not torch._dynamo.utils.counters["graph_break"]
