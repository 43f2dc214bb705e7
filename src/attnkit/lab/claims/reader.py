"""An encoder that says what a text is: the stack of `attnkit.models`, a mean over tokens, a linear head."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from attnkit.models import AttnkitEncoderConfig, AttnkitEncoderModel
from attnkit.models.common import HybridPreTrainedModel

__all__ = ["Reader"]


class Reader(HybridPreTrainedModel):
    """A classifier of whole sequences, in the terms of causal training data.

    Args:
        config: of the encoder; `classes` says how many there are.
    """

    config_class = AttnkitEncoderConfig

    def __init__(self, config: AttnkitEncoderConfig) -> None:
        super().__init__(config)
        self.model = AttnkitEncoderModel(config)
        self.head = nn.Linear(config.hidden_size, getattr(config, "classes", 2))
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, use_cache: bool | None = None, **kwargs: Any) -> Any:
        """Logits [B, T, classes], the same at every token, and with labels the loss.

        Args:
            input_ids: [B, T].
            labels: [B, T]; the class stands at the last token.
            use_cache, kwargs: nothing is kept, and the loss is a mean over the batch whatever is counted.
        """
        logits = self.head(self.model(input_ids=input_ids).last_hidden_state.mean(1))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels[:, -1])
        return SequenceClassifierOutput(loss=loss, logits=logits[:, None].expand(-1, input_ids.shape[1], -1))
