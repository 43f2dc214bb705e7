"""The operators whose kernels can be tuned."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit import ops
from attnkit._core.errors import MissingExtra
from attnkit._core.registry import Registry
from attnkit._core.triton import HAS_TRITON
from attnkit._core.triton.configs import Config, ConfigTable
from attnkit._core.triton.probe import Probe

__all__ = ["TUNABLES", "Tunable"]


@dataclass(frozen=True)
class Tunable:
    """What tuning needs to know about an operator.

    Attributes:
        op: its name in `attnkit.ops`.
        table: where its kernels look their configurations up.
        candidates: (kernel, bits, padded width, bytes of shared memory) -> configurations worth trying.
        probe: (kernel, dtype, padded width, device) -> the kernel on a representative problem.
        truth: a probe -> its outputs in float64, by name, from code that shares nothing with the kernels.
    """

    op: str
    table: ConfigTable
    candidates: Callable[[str, int, int, int], tuple[Config, ...]]
    probe: Callable[[str, torch.dtype, int, torch.device], Probe]
    truth: Callable[[Probe], dict[str, Tensor]]


def _attention() -> Tunable:
    if not HAS_TRITON:
        raise MissingExtra("Triton is not installed; run: pip install 'attnkit[triton]'")
    from attnkit.ops._attention_core._triton import tuning

    return Tunable("attention", tuning.CONFIGS, tuning.candidates, tuning.probe, _attention_truth)


def _mlstm() -> Tunable:
    if not HAS_TRITON:
        raise MissingExtra("Triton is not installed; run: pip install 'attnkit[triton]'")
    from attnkit.ops._chunkwise_core._triton import tuning

    return Tunable("mlstm", tuning.CONFIGS, tuning.candidates, tuning.probe, _mlstm_truth)


def _mlstm_truth(probe: Probe) -> dict[str, Tensor]:
    wanted = probe.upstream is not None
    leaves = {name: tensor.double().requires_grad_(wanted) for name, tensor in probe.inputs.items()}
    batch, _, heads, width = leaves["k"].shape
    sizes = ((width, leaves["v"].shape[-1]), (width,), ())
    S, n, m = (leaves["k"].new_zeros(batch, heads, *size) for size in sizes)
    leaves["S"] = S.requires_grad_(wanted)
    with torch.enable_grad():
        out, state = ops.mlstm(
            **{name: leaves[name] for name in probe.inputs}, initial_state=ops.RecurrentState(S, n, m), backend="torch"
        )
    found = {"out": out.detach(), "S": state.S.detach()}
    if probe.upstream is None:
        return found
    grads = torch.autograd.grad(out, list(leaves.values()), probe.upstream.double())
    return found | {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _attention_truth(probe: Probe) -> dict[str, Tensor]:
    inputs = dict(probe.inputs)
    leaves = {name: inputs[name].double().requires_grad_(probe.upstream is not None) for name in ("q", "k", "v")}
    with torch.enable_grad():
        out, lse = ops.attention(**inputs | leaves, return_lse=True, backend="torch")
    if probe.upstream is None:
        return {"out": out, "lse": lse}
    grads = torch.autograd.grad(out, list(leaves.values()), probe.upstream.double())
    return {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


TUNABLES: Registry[Callable[[], Tunable]] = Registry("tunable operator")
TUNABLES.register("attention", _attention)
TUNABLES.register("mlstm", _mlstm)
