"""xLSTM-7B: blocks of an mLSTM and a SwiGLU, logits with a bound."""

from attnkit.models.xlstm.configuration import AttnkitXLSTMConfig
from attnkit.models.xlstm.conversion import from_xlstm
from attnkit.models.xlstm.modeling import AttnkitXLSTMForCausalLM, AttnkitXLSTMModel
from attnkit.models.xlstm.parity import random_xlstm, xlstm_parity

__all__ = [
    "AttnkitXLSTMConfig",
    "AttnkitXLSTMForCausalLM",
    "AttnkitXLSTMModel",
    "from_xlstm",
    "random_xlstm",
    "xlstm_parity",
]
