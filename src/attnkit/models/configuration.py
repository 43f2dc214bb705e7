"""The configuration that all families share."""

from collections.abc import Iterator
from typing import Any, ClassVar

from attnkit._core.checks import check_choice
from attnkit._core.errors import OptionError, UnsupportedError
from attnkit._core.lazy import require

require("transformers", extra="hf")  # where it is missing, this says how to get it

from transformers import PreTrainedConfig  # noqa: E402

import attnkit.models.parts  # noqa: E402, F401  # a configuration is checked against what is registered
from attnkit.models.registry import MIXERS, MLPS, MixerSpec  # noqa: E402

__all__ = ["HybridConfig"]


class HybridConfig(PreTrainedConfig):
    """Shape of a stack of blocks; arguments are keywords, and unknown ones are kept for mixers to read.

    Attributes:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers: sizes.
        num_attention_heads, num_key_value_heads, head_dim: of attention; None means as many, and hidden_size / heads.
        mixer_types: one registered mixer a layer, or one name for all layers; None means "attention".
        mlp_types: one registered feed-forward part a layer, or one name for all layers; None means "swiglu".
        layer_types: what each layer keeps in the cache, in transformers' words; derived from `mixer_types`.
        sliding_window: keys that a sliding layer sees, the token itself counted.
        max_position_embeddings: the longest sequence the model is meant for.
        rope_parameters: {"rope_type": "default", "rope_theta": base}; other types are refused.
        norm_type, norm_eps: "rmsnorm" or "layernorm".
        attention_bias, mlp_bias: of the projections.
        initializer_range: standard deviation of new weights.
        tie_word_embeddings: the head's weights are the embedding's.
    Raises:
        OptionError, UnsupportedError: values that contradict each other; the message names the layer.
    """

    model_type: ClassVar[str] = "attnkit_hybrid"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    bidirectional: ClassVar[bool] = False

    vocab_size: int = 32_000
    hidden_size: int = 512
    intermediate_size: int = 1_408
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    mixer_types: list[str] | str | None = None
    mlp_types: list[str] | str | None = None
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    max_position_embeddings: int = 2_048
    rope_parameters: dict[str, Any] | None = None
    norm_type: str = "rmsnorm"
    norm_eps: float = 1e-5
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what was left out, then check."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise OptionError(
                    f"hidden_size={self.hidden_size} is no multiple of num_attention_heads={self.num_attention_heads}; "
                    f"give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        for name, default in (("mixer_types", "attention"), ("mlp_types", "swiglu")):
            given = getattr(self, name) or default
            setattr(self, name, [given] * self.num_hidden_layers if isinstance(given, str) else list(given))
        derived = [spec.cache_type or "linear_attention" for _, spec in self.mixers()]
        if self.layer_types is not None and list(self.layer_types) != derived:
            raise OptionError(
                f"layer_types={self.layer_types} contradicts mixer_types={self.mixer_types}, which give {derived}; leave it out"
            )
        self.layer_types = derived
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self.check()

    def mixers(self) -> Iterator[tuple[int, MixerSpec]]:
        """Layer index and mixer of each layer.

        Raises:
            OptionError: an unknown mixer; the message names the layer.
        """
        for index, name in enumerate(self.mixer_types or ()):
            try:
                yield index, MIXERS[name]
            except OptionError as error:
                raise OptionError(f"layer {index}: {error}; a mixer of your own must be registered first") from None

    def check(self) -> None:
        """Refuse what contradicts itself; models call it again, since a configuration can be changed.

        Raises:
            OptionError, UnsupportedError: see the class.
        """
        for name in ("mixer_types", "mlp_types"):
            types = getattr(self, name)
            if len(types) != self.num_hidden_layers:
                raise OptionError(f"{name} has {len(types)} entries for num_hidden_layers={self.num_hidden_layers}")
        for index, mlp in enumerate(self.mlp_types or ()):
            if mlp not in MLPS:
                raise OptionError(f"layer {index}: mlp {mlp!r} is unknown; known: {', '.join(MLPS)}")
        check_choice("norm_type", self.norm_type, ("rmsnorm", "layernorm"))
        self._check_heads()
        self._check_rope()
        self._check_layers()

    def _check_heads(self) -> None:
        assert self.num_key_value_heads is not None  # filled in at construction, as the head width is
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise OptionError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )

    def _check_rope(self) -> None:
        assert self.head_dim is not None
        if not any(spec.needs_rope for _, spec in self.mixers()):
            return
        if self.head_dim % 2:
            raise OptionError(f"head_dim={self.head_dim} is odd; rotary embeddings turn pairs of channels")
        rope = self.rope_parameters or {}
        unknown = {name for name, value in rope.items() if name not in ("rope_type", "rope_theta") and value is not None}
        if rope.get("rope_type", "default") != "default" or unknown:
            raise UnsupportedError(
                f"rope_parameters={rope}: attnkit models have the default rotary embedding only, "
                f"{{'rope_type': 'default', 'rope_theta': base}}"
            )

    def _check_layers(self) -> None:
        produced: set[str] = set()
        for index, spec in self.mixers():
            layer = f"layer {index} ({spec.name})"
            missing = [field for field in spec.consumes if field not in produced]
            if missing:
                raise OptionError(f"{layer} reads {', '.join(missing)}, which no earlier layer produces")
            produced |= set(spec.produces)
            if spec.cache_type == "sliding_attention" and (self.sliding_window is None or self.sliding_window < 1):
                raise OptionError(f"{layer} needs sliding_window, the keys a token sees; it is {self.sliding_window}")
            if self.bidirectional and not spec.bidirectional:
                raise UnsupportedError(f"{layer} is causal only; {type(self).__name__} needs mixers that see both sides")
