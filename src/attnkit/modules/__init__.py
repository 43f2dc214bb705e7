"""Layers over `attnkit.ops`, without transformers: mixers, feed-forward parts, norms, rotary embeddings.

A mixer is a module called as `mixer(x, context, shared)`; `MixerContext` and `Shared` say what it is given.
"""

from attnkit.modules.attention import SoftmaxAttention
from attnkit.modules.mixing import MixerContext, Shared
from attnkit.modules.mlp import MLP, SwiGLU
from attnkit.modules.norms import make_norm
from attnkit.modules.rotary import RotaryEmbedding, rotate
from attnkit.modules.selection import Kept, LearnedDrop, LSHHasher, RandomDrop, Redrawn, TopKDrop
from attnkit.modules.sparse_attention import SparseCausalAttention

__all__ = [
    "MLP",
    "Kept",
    "LSHHasher",
    "LearnedDrop",
    "MixerContext",
    "RandomDrop",
    "Redrawn",
    "RotaryEmbedding",
    "Shared",
    "SoftmaxAttention",
    "SparseCausalAttention",
    "SwiGLU",
    "TopKDrop",
    "make_norm",
    "rotate",
]
