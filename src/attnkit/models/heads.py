"""Language models: the stack and a linear head over the vocabulary."""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput

from attnkit._core.errors import OptionError
from attnkit.models.cache import has_keys
from attnkit.models.common import HybridModel, HybridPreTrainedModel
from attnkit.models.configuration import HybridConfig
from attnkit.models.inputs import mask_starts

__all__ = ["HybridForCausalLM", "HybridForMaskedLM"]


class _WithHead(HybridPreTrainedModel):
    """A model and a linear head over the vocabulary."""

    model_class: ClassVar[type[HybridModel]] = HybridModel
    accepts_loss_kwargs = True  # the trainer then passes num_items_in_batch
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def _loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        loss = self.loss_function(
            logits=logits, labels=labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
        )
        assert isinstance(loss, Tensor)
        return loss


class HybridForCausalLM(_WithHead, GenerationMixin):
    """A language model: predicts the next token.

    Args:
        config: shape of the stack.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Logits [B, T, V], and with labels the loss, as `CausalLMOutputWithPast`.

        Args:
            labels: [B, T] token ids, -100 where nothing is to be predicted; token t predicts label t + 1. The first tokens
                of packed sequences are never targets.
            logits_to_keep: the last n tokens only (0: all), or indices of tokens.
            num_items_in_batch: what the summed loss is divided by; None means the number of targets.
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_hidden_states,
            cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, return_dict: see `HybridModel.forward`.
        Raises:
            OptionError: labels together with logits_to_keep; and what `HybridModel.forward` raises.
        """
        whole = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if isinstance(logits_to_keep, int) and logits_to_keep < 0:
            raise OptionError(f"logits_to_keep={logits_to_keep} must be 0 (all) or more")
        if labels is not None and not whole:
            raise OptionError("labels need the logits of all tokens; leave out logits_to_keep")
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_hidden_states,
            cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, return_dict=True,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        x = outputs.last_hidden_state
        logits = self.logits(x if whole else x[:, kept])
        if labels is not None and cu_seq_lens_q is not None:
            labels = mask_starts(labels, cu_seq_lens_q)
        output = CausalLMOutputWithPast(
            loss=None if labels is None else self._loss(logits, labels, num_items_in_batch),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return self.returned(output, return_dict)

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] -> logits [B, T, V]."""
        out: Tensor = self.lm_head(x)
        return out

    def _supports_default_dynamic_cache(self) -> bool:  # type: ignore[override]  # it depends on the configuration
        """Where no layer keeps keys, the model makes its own cache; transformers' could not count tokens."""
        return has_keys(self.config)


class HybridForMaskedLM(_WithHead):
    """A language model that fills in masked tokens.

    Args:
        config: shape of the stack.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Logits [B, T, V], and with labels the loss, as `MaskedLMOutput`.

        Args:
            labels: [B, T] token ids, -100 where nothing is to be predicted; token t predicts label t.
            num_items_in_batch: what the summed loss is divided by; None means the number of targets.
            input_ids, attention_mask, position_ids, inputs_embeds, output_hidden_states, cu_seq_lens_q, cu_seq_lens_k,
            max_length_q, max_length_k, return_dict: see `HybridModel.forward`.
        Raises:
            ShapeError, DTypeError, OptionError, UnsupportedError: what `HybridModel.forward` raises.
        """
        outputs = self.model(
            input_ids, attention_mask, position_ids, None, inputs_embeds, None, output_hidden_states,
            cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, return_dict=True,
        )  # fmt: skip
        logits = self.lm_head(outputs.last_hidden_state)
        output = MaskedLMOutput(
            loss=None if labels is None else self._loss(logits, labels, num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
        )
        return self.returned(output, return_dict)
