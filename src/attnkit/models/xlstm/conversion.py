"""Weights of transformers' xLSTM in ours."""

from typing import Any

import torch
from transformers import xLSTMForCausalLM

from attnkit._core.errors import UnsupportedError
from attnkit.models.sources import read_source
from attnkit.models.xlstm.configuration import AttnkitXLSTMConfig, feed_forward_width
from attnkit.models.xlstm.modeling import AttnkitXLSTMForCausalLM

__all__ = ["from_xlstm", "rename"]

# transformers' name of a part of a weight's key -> ours
RENAMED = {
    "backbone": "model", "embeddings": "embed_tokens", "blocks": "layers", "out_norm": "norm",
    "norm_mlstm": "mixer_norm", "mlstm_layer": "mixer", "norm_ffn": "mlp_norm", "ffn": "mlp",
    "q": "q_proj", "k": "k_proj", "v": "v_proj", "ogate_preact": "ogate_proj", "igate_preact": "igate_proj",
    "fgate_preact": "fgate_proj", "out_proj": "o_proj",
    "proj_up_gate": "gate_proj", "proj_up": "up_proj", "proj_down": "down_proj",
}  # fmt: skip
# ends of keys that are no module's weight with us
_ENDS = {"igate_proj.bias": "igate_bias", "fgate_proj.bias": "fgate_bias", "multihead_norm.weight": "head_norm"}
# same name and meaning in both configurations
SAME = (
    "vocab_size", "hidden_size", "num_hidden_layers", "norm_eps", "output_logit_soft_cap", "tie_word_embeddings",
    "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
_REFUSED = {"weight_mode": ("single",), "use_bias": (False,), "add_out_norm": (True,)}


def from_xlstm(source: Any) -> AttnkitXLSTMForCausalLM:
    """Build our xLSTM with the weights of transformers'; the two share no memory.

    Args:
        source: an `xLSTMForCausalLM`, or a folder that holds one as config.json and safetensors.
    Returns:
        the model in the dtype of the source, on its device, in its mode (training or eval).
    Raises:
        InputError: the folder cannot be read; nothing is downloaded, unpickled or executed.
        UnsupportedError: no xLSTM, or one with fused weights, biases or without the last norm.
    """
    xlstm = read_source(source, xLSTMForCausalLM)
    config = _translate(xlstm)
    weights = {rename(key): value.detach().clone() for key, value in xlstm.state_dict().items()}
    with torch.device("meta"):
        model = AttnkitXLSTMForCausalLM(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config = xlstm.generation_config
    model.train(xlstm.training)
    return model


def rename(key: str) -> str:
    """Our key of a weight of transformers' xLSTM, "model.layers.0.mixer.q_proj.weight" for one."""
    key = ".".join(RENAMED.get(part, part) for part in key.split("."))
    for theirs, ours in _ENDS.items():
        key = key.removesuffix(theirs) + ours if key.endswith(theirs) else key
    return key


def _translate(xlstm: Any) -> AttnkitXLSTMConfig:
    if not isinstance(xlstm, xLSTMForCausalLM):
        raise UnsupportedError(f"{type(xlstm).__name__} is no xLSTMForCausalLM, the one model whose weights are known here")
    theirs: Any = xlstm.config
    for name, allowed in _REFUSED.items():
        if getattr(theirs, name) not in allowed:
            raise UnsupportedError(f"{name}={getattr(theirs, name)!r}; our xLSTM has {allowed[0]!r}")
    options = {
        "qk_ratio": theirs.qk_dim_factor, "v_ratio": theirs.v_dim_factor, "gate_soft_cap": theirs.gate_soft_cap,
        "eps": theirs.eps, "norm_eps": theirs.norm_eps,
    }  # fmt: skip
    return AttnkitXLSTMConfig(
        **{name: getattr(theirs, name) for name in SAME},
        num_attention_heads=theirs.num_heads,
        intermediate_size=feed_forward_width(theirs.hidden_size, theirs.ffn_proj_factor, theirs.ffn_round_up_to_multiple_of),
        mlstm=options,
    )
