"""Models on one hybrid stack, compatible with Hugging Face's; importing this registers them with the Auto classes.

Families: `AttnkitDecoderForCausalLM` and `AttnkitEncoderForMaskedLM`. `mixer` adds a mixer, `PRESETS` names configurations.
"""

from attnkit._core.lazy import require

require("transformers", extra="hf")  # where it is missing, this says how to get it

from attnkit.models.auto import register_all  # noqa: E402
from attnkit.models.cache import StateCache  # noqa: E402
from attnkit.models.common import HybridBlock, HybridModel  # noqa: E402
from attnkit.models.configuration import HybridConfig  # noqa: E402
from attnkit.models.decoder import (  # noqa: E402
    AttnkitDecoderConfig,
    AttnkitDecoderForCausalLM,
    AttnkitDecoderModel,
    Parity,
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
    "llama_config",
    "mixer",
    "parity",
    "random_llama",
    "summarise",
]

register_all()
