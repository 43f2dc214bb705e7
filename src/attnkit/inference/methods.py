"""What the methods of each kind offer, and the registries that know them by name."""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from torch import Tensor

from attnkit._core.registry import Registry
from attnkit.inference.call import LayerCall
from attnkit.inference.rope import RopeSpec

__all__ = ["CORRECTIONS", "POSITIONS", "PREFILLS", "CachePolicy", "Correction", "Position", "Prefill"]


class Prefill(Protocol):
    """How full-attention layers attend; a frozen dataclass of its options, registered in PREFILLS under its name.

    Attributes:
        name: in PREFILLS.
        sparse: whether queries miss keys that dense attention shows them.
        drops_keys: whether it removes keys from the cache.
        needs_causal: whether it refuses bidirectional models.
        needs_rotation: whether it turns queries or keys by positions of its own (`call.rope` is then set).
    """

    name: ClassVar[str]
    sparse: ClassVar[bool]
    drops_keys: ClassVar[bool]
    needs_causal: ClassVar[bool]

    @property
    def needs_rotation(self) -> bool: ...  # noqa: D102

    def attend(self, call: LayerCall) -> Tensor:
        """Return out [B, T, H, Dv]; afterwards the layer of `call` may drop keys."""
        ...


class Position(Protocol):
    """How positions turn queries and keys; a frozen dataclass of its options, registered in POSITIONS under its name."""

    name: ClassVar[str]

    def rescale(self, rope: RopeSpec) -> RopeSpec:
        """Return the rotary embedding that the model gets instead of `rope`."""
        ...


class Correction(Protocol):
    """What repairs the outputs of a sparse prefill; registered in CORRECTIONS under its name."""

    name: ClassVar[str]

    def attend(self, call: LayerCall, prefill: Prefill) -> Tensor:
        """Return the corrected out [B, T, H, Dv]."""
        ...


class CachePolicy(Protocol):
    """What happens to a layer's stored keys: a press of `attnkit.kv`.

    Attributes:
        drops_keys: whether it removes keys from the cache.
        needs: what it has to be given, see `attnkit.kv.pressing.Scorer`.
    """

    drops_keys: ClassVar[bool]

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def needs(self) -> frozenset[str]: ...  # noqa: D102

    def to_dict(self) -> dict[str, Any]:
        """Return name and options as plain values."""
        ...

    def after(self, call: Any) -> None:
        """Called with a `LayerCall` when the layer's attention is done; may compress `call.layer`."""
        ...

    def after_pass(self, passed: Any) -> None:
        """Called with a `bridge.PassDone` when all layers are done."""
        ...


PREFILLS: Registry[Callable[[], Prefill]] = Registry("prefill method")
POSITIONS: Registry[Callable[[], Position]] = Registry("position method")
CORRECTIONS: Registry[Callable[[], Correction]] = Registry("correction")
