"""What a model's rotary embedding does, and rotating by positions of one's own."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from attnkit._core.errors import ShapeError, UnsupportedArchitecture

__all__ = ["RopeSpec"]


@dataclass(frozen=True, eq=False)
class RopeSpec:
    """The rotary embedding of a model's full-attention layers.

    Attributes:
        inv_freq: [R / 2] float32, radians a position of each rotated pair.
        attention_factor: what the model multiplies cos and sin with.
        interleaved: whether pairs are (2i, 2i + 1), as in Cohere and GLM, or (i, i + R / 2), as in Llama; None where
            attnkit does not know the architecture.
        rope_type: "default", "linear", "yarn", "llama3", ... as in the model's configuration.
        theta: base of the geometric series of unscaled frequencies.
        max_positions: length of the context that the frequencies were trained for.
        model_type: the architecture, for messages.
    """

    inv_freq: Tensor
    attention_factor: float
    interleaved: bool | None
    rope_type: str
    theta: float
    max_positions: int
    model_type: str

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Read a transformers configuration (of the whole model or of its text part).

        Raises:
            UnsupportedArchitecture: no rotary embedding, or one whose frequencies change with the length of the input.
        """
        from attnkit.inference import compat

        text = config.get_text_config(decoder=True)
        parameters = compat.rope_parameters(text)
        inv_freq, factor = compat.rope_frequencies(text, parameters)
        return cls._build(text, parameters, inv_freq, factor)

    @classmethod
    def from_model(cls, model: Any) -> Self:
        """Read what a model rotates with now: its buffers, whoever filled them.

        Raises:
            UnsupportedArchitecture: as `from_config`, or not exactly one rotary module.
        """
        from attnkit.inference import compat

        text = compat.text_model(model)
        parameters = compat.rope_parameters(text.config)
        rotary = compat.Rotary.of(text)
        return cls._build(text.config, parameters, rotary.inv_freq.detach().float().clone(), float(rotary.scaling))

    @classmethod
    def _build(cls, config: Any, parameters: dict[str, Any], inv_freq: Tensor, factor: float) -> Self:
        from attnkit.inference import compat

        return cls(
            inv_freq=inv_freq,
            attention_factor=factor,
            interleaved=compat.rope_interleaved(config.model_type),
            rope_type=parameters["rope_type"],
            theta=float(parameters["rope_theta"]),
            max_positions=int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings),
            model_type=config.model_type,
        )

    @property
    def rotary_dim(self) -> int:
        """R, the leading channels of a head that are rotated; the others pass."""
        return 2 * self.inv_freq.numel()

    def replace(self, *, inv_freq: Tensor, attention_factor: float) -> Self:
        """The same embedding with other frequencies; `inv_freq` may come in any float dtype."""
        return dataclasses.replace(self, inv_freq=inv_freq.float(), attention_factor=attention_factor)

    def check_rotation(self) -> None:
        """Refuse `rotate` where the channel order is unknown.

        Raises:
            UnsupportedArchitecture: guessing it would give wrong numbers.
        """
        if self.interleaved is None:
            raise UnsupportedArchitecture(
                f"re-rotation needs the channel order of {self.model_type!r}, which attnkit does not know; "
                f"use rerotate=False, or add the model type to attnkit.inference.compat"
            )

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn each head by `positions`; turning by p and then by d equals turning by p + d.

        The attention factor is not applied: rotations add up, the factor would not.

        Args:
            x: [B, T, H, D] with D >= R.
            positions: [T] or [B, T], any integers, negative ones too.
        Returns:
            [B, T, H, D] in the dtype of x.
        Raises:
            UnsupportedArchitecture: see `check_rotation`.
            ShapeError: the head is narrower than R.
        """
        self.check_rotation()
        width = self.rotary_dim
        if x.shape[-1] < width:
            raise ShapeError(f"x has head width {x.shape[-1]}; the rotary embedding turns {width} channels")
        # in float64: at position 100,000 a float32 angle is off by up to 0.004 radians
        angle = positions[..., None].double() * self.inv_freq.to(x.device, torch.float64)
        acc = torch.promote_types(x.dtype, torch.float32)
        cos, sin = (part.to(acc).unsqueeze(-2) for part in (angle.cos(), angle.sin()))  # [(B,) T, 1, R / 2]
        turned = x[..., :width].to(acc)
        first, second = (turned[..., 0::2], turned[..., 1::2]) if self.interleaved else turned.chunk(2, dim=-1)
        pair = (first * cos - second * sin, second * cos + first * sin)
        turned = torch.stack(pair, dim=-1).flatten(-2) if self.interleaved else torch.cat(pair, dim=-1)
        return torch.cat([turned.to(x.dtype), x[..., width:]], dim=-1)
