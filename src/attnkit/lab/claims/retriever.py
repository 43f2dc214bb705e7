"""Encoders that retrieve: a masked language model to begin with, and one vector a text."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput

from attnkit.models import AttnkitEncoderConfig, AttnkitEncoderForMaskedLM, AttnkitEncoderModel
from attnkit.models.common import HybridPreTrainedModel

__all__ = ["Retriever", "RetrieverForMaskedLM"]

_SHARPNESS = 20.0  # cosines are multiplied by it, as is usual for contrastive losses


class RetrieverForMaskedLM(AttnkitEncoderForMaskedLM):
    """The encoder as a masked language model, in the terms of causal training data.

    Args:
        config: of the encoder.
    """

    def forward(  # type: ignore[override]  # what is not named here is passed on
        self, input_ids: Tensor, labels: Tensor | None = None, use_cache: bool | None = None, **kwargs: Any
    ) -> Any:
        """With labels the loss; else logits [B, T, V], each where `validate` looks for it, at the token before its own.

        Args:
            input_ids: [B, T].
            labels: [B, T], the hidden tokens, -100 elsewhere.
            use_cache: nothing is kept.
            kwargs: boundaries of packed texts, see `HybridModel.forward`.
        """
        found = super().forward(input_ids, labels=labels, **kwargs)
        return found if labels is not None else MaskedLMOutput(logits=found.logits.roll(-1, 1))


class Retriever(HybridPreTrainedModel):
    """One vector for each text: the mean over its tokens, of length 1; trained to find the other half of a pair.

    Args:
        config: of the encoder.
    """

    config_class = AttnkitEncoderConfig

    def __init__(self, config: AttnkitEncoderConfig) -> None:
        super().__init__(config)
        self.model = AttnkitEncoderModel(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def embed(self, input_ids: Tensor, cu_seq_lens_q: Tensor, **kwargs: Any) -> Tensor:
        """Vectors [N, C] of N packed texts, float32.

        Args:
            input_ids: [1, T].
            cu_seq_lens_q: [N + 1]; no text is empty.
            kwargs: the other boundaries, see `HybridModel.forward`.
        """
        states = self.model(input_ids=input_ids, cu_seq_lens_q=cu_seq_lens_q, **kwargs).last_hidden_state[0]
        return F.normalize(torch.segment_reduce(states.float(), "mean", lengths=cu_seq_lens_q.diff()), dim=-1)

    def forward(
        self,
        input_ids: Tensor,
        cu_seq_lens_q: Tensor,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """With labels the loss of choosing each query's document among all of the row; else logits [1, T, documents].

        Args:
            input_ids, cu_seq_lens_q: queries, then as many documents, packed.
            labels: of `PairRows`; document i answers query i.
            use_cache, num_items_in_batch: nothing is kept, and a row is a whole batch.
            kwargs: the other boundaries.
        """
        queries, documents = (vectors := self.embed(input_ids, cu_seq_lens_q, **kwargs)).chunk(2)
        with torch.autocast(vectors.device.type, enabled=False):
            if labels is not None:
                right = torch.arange(len(queries), device=vectors.device)
                return SequenceClassifierOutput(loss=F.cross_entropy(_SHARPNESS * queries @ documents.T, right))
            logits = (_SHARPNESS * vectors @ documents.T).repeat_interleave(cu_seq_lens_q.diff(), 0)
        return SequenceClassifierOutput(logits=logits[None])
