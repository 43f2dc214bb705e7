"""Everything attnkit's policies know about the insides of transformers; no other file names its private parts."""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from attnkit._core.errors import UnsupportedArchitecture
from attnkit._core.lazy import require

require("transformers", extra="hf")  # where it is missing, this says how to get it

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.masking_utils import causal_mask_function  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

__all__ = [
    "Rotary",
    "attention_modules",
    "get_attention_name",
    "intercept",
    "interface_modules",
    "is_plain_causal",
    "refused_cache",
    "register",
    "rope_frequencies",
    "rope_interleaved",
    "rope_parameters",
    "set_attention_name",
    "text_model",
    "unregister",
]

# pairs of rotated channels: (i, i + R / 2), or (2i, 2i + 1); the tests turn each model's own rotation against this
HALF_SPLIT = frozenset(
    [
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "starcoder2",
    ]
)
INTERLEAVED = frozenset(["cohere", "ernie4_5", "glm", "glm4"])
FULL = "full_attention"


def text_model(model: Any) -> Any:
    """The decoder that holds the attention layers: the model itself, or a part of it.

    Raises:
        UnsupportedArchitecture: an encoder-decoder, or not a transformers model.
    """
    if not hasattr(model, "get_decoder") or not hasattr(model, "config"):
        raise UnsupportedArchitecture(
            f"{type(model).__name__} is not a transformers model; policies need a decoder-only PreTrainedModel"
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedArchitecture(f"{type(model).__name__} is an encoder-decoder; policies need a decoder-only model")
    return model.get_decoder()


def attention_modules(text: Any) -> list[Any]:
    """The attention modules of a text model, all of which must call the attention interface.

    Raises:
        UnsupportedArchitecture: there are none, or one computes attention on its own.
    """
    modules = [module for module in text.modules() if type(module).__name__.endswith("Attention")]
    if not modules:
        raise UnsupportedArchitecture(
            f"{type(text).__name__} has no module whose class is named ...Attention; policies need such modules, calling "
            f"ALL_ATTENTION_FUNCTIONS.get_interface(...)"
        )
    for cls in dict.fromkeys(map(type, modules)):  # reading sources is slow, and layers share their class
        if not _calls_interface(cls):
            raise UnsupportedArchitecture(
                f"{cls.__name__} computes attention on its own; policies need modules that call "
                f"ALL_ATTENTION_FUNCTIONS.get_interface(...) in forward"
            )
    return modules


def interface_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, of all that call the attention interface, in the order of a model."""
    named = {name: part for name, part in model.named_modules() if type(part).__name__.endswith("Attention")}
    calls = {cls: _calls_interface(cls) for cls in {type(part) for part in named.values()}}
    return {name: part for name, part in named.items() if calls[type(part)]}


@contextmanager
def intercept(names: Iterable[str], around: Callable[..., Any]) -> Iterator[None]:
    """Put `around(run, module, *args, **kwargs)` in the place of attention implementations, whoever calls them; `run` takes the
    other arguments and computes what the implementation would."""
    before = {name: ALL_ATTENTION_FUNCTIONS._local_mapping.get(name) for name in names}
    for name in before:
        ALL_ATTENTION_FUNCTIONS[name] = _around(ALL_ATTENTION_FUNCTIONS.get(name), around)
    try:
        yield
    finally:
        for name, function in before.items():
            if function is None:
                del ALL_ATTENTION_FUNCTIONS[name]
            else:
                ALL_ATTENTION_FUNCTIONS[name] = function


def _around(function: Callable[..., Any] | None, around: Callable[..., Any]) -> Callable[..., Any]:
    def implementation(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # "eager" is no entry of the interface: each file of models has its own
        run = function or vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        return around(run, module, *args, **kwargs)

    return implementation


def _calls_interface(cls: type) -> bool:
    try:
        return "get_interface(" in inspect.getsource(cls)
    except (OSError, TypeError):  # defined where there is no source to read
        return False


def register(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Make `name` an attention implementation together with its mask; without a mask, padding would be lost."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def unregister(name: str) -> None:
    """Undo `register`."""
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(name, None)


def get_attention_name(config: Any) -> Any:
    """The attention implementation of one configuration, its sub-configurations left aside."""
    return config._attn_implementation_internal


def set_attention_name(config: Any, name: Any) -> None:
    """Set what `get_attention_name` reads; the public setter would also switch sub-configurations and vision towers."""
    config._attn_implementation_internal = name


def is_plain_causal(mask_function: object) -> bool:
    """Whether this is transformers' own causal mask, undecorated."""
    return mask_function is causal_mask_function


def refused_cache(cache: Any) -> str | None:
    """Why policies cannot work on a cache, or None."""
    kinds = {base.__name__ for layer in getattr(cache, "layers", ()) for base in type(layer).__mro__}
    name = type(cache).__name__
    if not hasattr(cache, "layers"):
        return f"{name} is not a decoder's cache"
    if any("Quantized" in kind for kind in kinds):
        return f"{name} stores quantised keys"
    if "StaticLayer" in kinds:
        return f"{name} is static (compileable): its length does not say how many tokens it holds"
    return None


def rope_parameters(config: Any) -> dict[str, Any]:
    """The rotary settings of full-attention layers.

    Raises:
        UnsupportedArchitecture: there are none, or the frequencies depend on the length of the input.
    """
    parameters = getattr(config, "rope_parameters", None)
    if parameters and isinstance(parameters.get(FULL), dict):
        parameters = parameters[FULL]
    if not parameters or "rope_theta" not in parameters or "rope_type" not in parameters:
        raise UnsupportedArchitecture(
            f"{config.model_type!r} has no rotary embedding on its full-attention layers; position methods and re-rotation "
            f"need one"
        )
    rope_type = parameters["rope_type"]
    if rope_type in ("dynamic", "longrope"):
        raise UnsupportedArchitecture(
            f"rope_type {rope_type!r} changes its frequencies with the length of the input; position methods and re-rotation "
            f"need fixed ones (default, linear, llama3, yarn)"
        )
    return dict(parameters)


def rope_frequencies(config: Any, parameters: dict[str, Any]) -> tuple[Tensor, float]:
    """inv_freq [R / 2] and attention factor that a configuration asks for."""
    if parameters["rope_type"] != "default":
        nested = isinstance(config.rope_parameters.get(FULL), dict)
        inv_freq, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, layer_type=FULL if nested else None)
        return inv_freq, float(factor)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    return 1.0 / parameters["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float) / width), 1.0


def rope_interleaved(model_type: str) -> bool | None:
    """The channel order of an architecture; None where it is not known."""
    if model_type in HALF_SPLIT:
        return False
    return True if model_type in INTERLEAVED else None


@dataclass(frozen=True)
class Rotary:
    """The buffers that full-attention layers rotate by.

    Attributes:
        module: the rotary module.
        prefix: "" or "full_attention_", where layer types have buffers of their own.
    """

    module: nn.Module
    prefix: str

    @classmethod
    def of(cls, text: Any) -> Self:
        """Find them in a text model.

        Raises:
            UnsupportedArchitecture: not exactly one place.
        """
        prefixes = ("", f"{FULL}_")
        found = [
            cls(module, prefix)
            for module in text.modules()
            for prefix in prefixes
            if f"{prefix}inv_freq" in module._buffers and hasattr(module, f"{prefix}attention_scaling")
        ]
        if len(found) != 1:
            raise UnsupportedArchitecture(
                f"{type(text).__name__} has {len(found)} rotary embeddings for full-attention layers; position methods and "
                f"re-rotation need exactly one"
            )
        return found[0]

    @property
    def inv_freq(self) -> Tensor:
        """[R / 2]; looked up each time, since moving the model replaces it."""
        return self.module.get_buffer(f"{self.prefix}inv_freq")

    @property
    def scaling(self) -> Any:
        """What cos and sin are multiplied with."""
        return getattr(self.module, f"{self.prefix}attention_scaling")

    def write(self, inv_freq: Tensor, scaling: Any) -> None:
        """Replace the contents of both, in place."""
        with torch.no_grad():
            self.inv_freq.copy_(inv_freq)
        setattr(self.module, f"{self.prefix}attention_scaling", scaling)
