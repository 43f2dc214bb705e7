"""The prepared call that every form of the mLSTM runs."""

from dataclasses import dataclass

from torch import Tensor

from attnkit._core.checks import check_choice
from attnkit._core.errors import OptionError, UnsupportedError
from attnkit.ops._chunkwise_core.call import RecurrentCall, check_gate, check_recurrent, check_step
from attnkit.ops._chunkwise_core.state import RecurrentState
from attnkit.ops._chunkwise_core.step import StepCall

__all__ = ["INPUT_GATES", "MLSTMCall", "check_options", "parts_of", "prepare", "prepare_step"]

INPUT_GATES = ("exp", "sigmoid")


@dataclass
class MLSTMCall(RecurrentCall):
    """Checked arguments of the mLSTM.

    Attributes:
        i, f: [B, T, Hkv] (packed [R, Hkv]) before the gates' functions, in the accumulation dtype.
        input_gate: "exp" or "sigmoid".
        normalize: whether outputs are divided by q . n.
        eps: added to that.
    """

    i: Tensor
    f: Tensor
    input_gate: str
    normalize: bool
    eps: float


def parts_of(input_gate: str, normalize: bool) -> str:
    """Letters of what the state has."""
    return "Snm" if input_gate == "exp" else "Sn" if normalize else "S"


def check_options(input_gate: str, normalize: bool, eps: float) -> None:
    """Refuse unknown gates, exponential ones without a normaliser, and a negative eps."""
    check_choice("input_gate", input_gate, INPUT_GATES)
    if input_gate == "exp" and not normalize:
        raise UnsupportedError(
            'normalize=False with input_gate="exp": sums of exponential gates leave the range of floats; use "sigmoid", or '
            "normalise"
        )
    if not 0 <= eps < float("inf"):
        raise OptionError(f"eps={eps} must be a number of at least 0")


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    input_gate: str = "exp",
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    initial_state: RecurrentState | None = None,
    chunk_size: int | str = "auto",
    cu_seqlens: Tensor | None = None,
) -> MLSTMCall:
    """Check the arguments of `mlstm` (its docstring says what is raised)."""
    check_options(input_gate, normalize, eps)
    base = check_recurrent(q, k, v, scale, initial_state, cu_seqlens, chunk_size, parts_of(input_gate, normalize))
    i, f = check_gate("i", i, k), check_gate("f", f, k)
    return MLSTMCall(**base.parts(), i=i, f=f, input_gate=input_gate, normalize=normalize, eps=float(eps))


def prepare_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: RecurrentState,
    *,
    input_gate: str = "exp",
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
) -> StepCall:
    """Check the arguments of `mlstm_step` (its docstring says what is raised)."""
    check_options(input_gate, normalize, eps)
    scale, state = check_step(q, k, v, scale, state, parts_of(input_gate, normalize))
    return StepCall(q, k, v, check_gate("i", i, k), check_gate("f", f, k), state, input_gate, scale, float(eps))
