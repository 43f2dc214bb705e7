"""Layers over `attnkit.ops`, without transformers: mixers, feed-forward parts, norms, rotary embeddings.

A mixer is a module called as `mixer(x, context, shared)`; `MixerContext` and `Shared` say what it is given.
"""

from attnkit.modules.attention import GroupedAttention, SoftmaxAttention
from attnkit.modules.entmax import AlphaSchedule, EntmaxAttention
from attnkit.modules.lightning import LightningAttention
from attnkit.modules.mixing import MixerContext, Shared
from attnkit.modules.mlp import MLP, SwiGLU
from attnkit.modules.mlstm import MLSTMLayer
from attnkit.modules.norms import make_norm
from attnkit.modules.recurrent import GroupNormGate
from attnkit.modules.rotary import RotaryEmbedding, rotate
from attnkit.modules.selection import Kept, LearnedDrop, LSHHasher, RandomDrop, Redrawn, TopKDrop
from attnkit.modules.simple_gla import SimpleGLA
from attnkit.modules.sparse_attention import SparseCausalAttention

__all__ = [
    "MLP",
    "AlphaSchedule",
    "EntmaxAttention",
    "GroupNormGate",
    "GroupedAttention",
    "LightningAttention",
    "MLSTMLayer",
    "MixerContext",
    "RotaryEmbedding",
    "Shared",
    "SimpleGLA",
    "SoftmaxAttention",
    "SwiGLU",
    "Kept",
    "LSHHasher",
    "LearnedDrop",
    "RandomDrop",
    "Redrawn",
    "SparseCausalAttention",
    "TopKDrop",
    "make_norm",
    "rotate",
]
