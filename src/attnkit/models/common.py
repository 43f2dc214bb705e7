"""One stack for every family: blocks of a mixer and a feed-forward part, and the model made of them."""

from typing import Any

from torch import Tensor, nn

from attnkit._core.errors import InputError, OptionError, UnsupportedError
from attnkit._core.lazy import require

require("transformers", extra="hf")  # where it is missing, this says how to get it

from transformers import PreTrainedModel  # noqa: E402
from transformers.modeling_layers import GradientCheckpointingLayer  # noqa: E402
from transformers.modeling_outputs import BaseModelOutputWithPast  # noqa: E402

from attnkit.models.cache import StateCache, check_cache, new_cache  # noqa: E402
from attnkit.models.configuration import HybridConfig  # noqa: E402
from attnkit.models.inputs import Packed, make_context  # noqa: E402
from attnkit.models.registry import MIXERS, MLPS  # noqa: E402
from attnkit.modules import MixerContext, RotaryEmbedding, Shared, make_norm  # noqa: E402

__all__ = ["HybridBlock", "HybridModel", "HybridPreTrainedModel"]


class HybridBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)).

    Args:
        config: of the model.
        layer_idx: which layer this is.
    """

    def __init__(self, config: HybridConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.mixer_types  # filled in by the configuration
        assert config.mlp_types
        self.layer_idx, self.spec = layer_idx, MIXERS[config.mixer_types[layer_idx]]
        self.mixer_norm = make_norm(config.norm_type, config.hidden_size, config.norm_eps)
        self.mixer = self.spec.build(config, layer_idx)
        build = MLPS[config.mlp_types[layer_idx]]
        self.mlp_norm = make_norm(config.norm_type, config.hidden_size, config.norm_eps) if build else None
        self.mlp = build(config, layer_idx) if build else None

    def forward(self, x: Tensor, context: MixerContext, *shared: Tensor | None) -> tuple[Tensor | None, ...]:
        """Hidden states [B, T, C] and the fields of `Shared` -> the same, one after the other.

        Raises:
            InputError: the mixer did not fill in what it is registered to produce.
        """
        passed = Shared(*shared)
        mixed = self.mixer(self.mixer_norm(x), context, passed)
        if isinstance(mixed, tuple):
            mixed, passed = mixed
        for field in self.spec.produces:
            if getattr(passed, field) is None:
                raise InputError(f"layer {self.layer_idx} ({self.spec.name}) is registered to produce {field}, and did not")
        x = x + mixed
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return (x, *passed)


class HybridPreTrainedModel(PreTrainedModel):
    """What transformers must know about all of our models."""

    config: HybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HybridBlock"]  # noqa: RUF012  # declared so by the base class, as the next two
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def __init__(self, config: HybridConfig) -> None:
        config.check()
        super().__init__(config)
        # states cannot be wound back, which assisted decoding would need
        self._is_stateful = "linear_attention" in (config.layer_types or ())

    def returned(self, output: Any, return_dict: bool | None) -> Any:
        """A forward pass's output as the caller wants it: with names, or as a tuple of what is there."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class HybridModel(HybridPreTrainedModel):
    """Embeddings, blocks, final norm.

    Args:
        config: shape of the stack.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        assert config.head_dim is not None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([HybridBlock(config, index) for index in range(config.num_hidden_layers)])
        self.norm = make_norm(config.norm_type, config.hidden_size, config.norm_eps)
        rotates = any(spec.needs_rope for _, spec in config.mixers())
        theta = (config.rope_parameters or {}).get("rope_theta") or config.default_theta
        self.rotary = RotaryEmbedding(config.head_dim, theta=theta) if rotates else None
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Hidden states of tokens, as `BaseModelOutputWithPast`.

        Args:
            input_ids, inputs_embeds: [B, T] or [B, T, C]; one of the two.
            attention_mask: [B, past + T], nonzero for real tokens; padding may stand on either side.
            position_ids: [B or 1, T]; None counts.
            past_key_values: a cache that grows; None makes one where it is wanted.
            use_cache: None means the configuration's, and False in training and for packed sequences.
            output_hidden_states: also return the input of every block and the output of the final norm.
            cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: boundaries of sequences packed into one row.
            return_dict: False returns a tuple of what is there; None means the configuration's.
        Raises:
            ShapeError, DTypeError, OptionError, UnsupportedError: see `attnkit.models.inputs.make_context`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise OptionError("give one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        packed = Packed(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        cache = self._cache(past_key_values, use_cache, packed)
        context = make_context(
            self.config, x, self.rotary,
            attention_mask=attention_mask, position_ids=position_ids, cache=cache, packed=packed,
        )  # fmt: skip
        shared: tuple[Tensor | None, ...] = Shared()
        states = [x]
        for layer in self.layers:
            x, *shared = layer(x, context, *shared)
            states.append(x)
        states[-1] = x = self.norm(x)
        if isinstance(cache, StateCache):
            cache.seen += x.shape[1]
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = BaseModelOutputWithPast(
            last_hidden_state=x, past_key_values=cache, hidden_states=tuple(states) if wanted else None
        )
        return self.returned(output, return_dict)

    def _cache(self, given: Any, use_cache: bool | None, packed: Packed) -> Any:
        if self.config.bidirectional:
            if given is not None or use_cache:
                raise UnsupportedError("use_cache: tokens of an encoder see those behind them, so that nothing can be cached")
            return None
        if given is None and use_cache is None:
            use_cache = self.config.use_cache and not self.training and packed.boundaries() is None
        if given is None:
            given = new_cache(self.config) if use_cache else None
        if given is not None:
            check_cache(given, self.config)
            if self.training and any(layer.gradient_checkpointing for layer in self.layers):
                raise OptionError("gradient checkpointing runs blocks twice, which a cache cannot bear; set use_cache=False")
        return given
