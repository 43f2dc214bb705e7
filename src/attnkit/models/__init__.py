"""Models on one hybrid stack, compatible with Hugging Face's; importing this registers them with the Auto classes.

Families: `AttnkitDecoderForCausalLM`, `AttnkitEncoderForMaskedLM`, `AttnkitXLSTMForCausalLM`. `mixer` adds a mixer, `PRESETS`
names configurations.
"""

from attnkit._core.lazy import require

require("transformers", extra="hf")  # where it is missing, this says how to get it

from attnkit.models.auto import register_all  # noqa: E402
from attnkit.models.cache import StateCache  # noqa: E402
from attnkit.models.common import HybridBlock, HybridModel  # noqa: E402
from attnkit.models.comparison import Parity  # noqa: E402
from attnkit.models.configuration import HybridConfig  # noqa: E402
from attnkit.models.decoder import (  # noqa: E402
    AttnkitDecoderConfig,
    AttnkitDecoderForCausalLM,
    AttnkitDecoderModel,
    from_llama,
    llama_config,
    parity,
    random_llama,
)
from attnkit.models.encoder import AttnkitEncoderConfig, AttnkitEncoderForMaskedLM, AttnkitEncoderModel  # noqa: E402
from attnkit.models.heads import HybridForCausalLM, HybridForMaskedLM  # noqa: E402
from attnkit.models.presets import PRESETS  # noqa: E402
from attnkit.models.registry import MIXERS, MLPS, MixerSpec, mixer  # noqa: E402
from attnkit.models.summary import LayerSummary, Summary, summarise  # noqa: E402
from attnkit.models.xlstm import (  # noqa: E402
    AttnkitXLSTMConfig,
    AttnkitXLSTMForCausalLM,
    AttnkitXLSTMModel,
    from_xlstm,
    random_xlstm,
    xlstm_parity,
)

__all__ = [
    "MIXERS",
    "MLPS",
    "PRESETS",
    "AttnkitDecoderConfig",
    "AttnkitDecoderForCausalLM",
    "AttnkitDecoderModel",
    "AttnkitEncoderConfig",
    "AttnkitEncoderForMaskedLM",
    "AttnkitEncoderModel",
    "AttnkitXLSTMConfig",
    "AttnkitXLSTMForCausalLM",
    "AttnkitXLSTMModel",
    "HybridBlock",
    "HybridConfig",
    "HybridForCausalLM",
    "HybridForMaskedLM",
    "HybridModel",
    "LayerSummary",
    "MixerSpec",
    "Parity",
    "StateCache",
    "Summary",
    "from_llama",
    "from_xlstm",
    "llama_config",
    "mixer",
    "parity",
    "random_llama",
    "random_xlstm",
    "summarise",
    "xlstm_parity",
]

register_all()
