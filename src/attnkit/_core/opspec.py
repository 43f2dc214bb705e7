"""What an operator publishes about itself, as data: cases, oracle, budget, rounding sites, invariances, backends, refusals."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnkit._core.dispatch import Backend
from attnkit._core.invariance import Invariance
from attnkit._core.registry import Registry

__all__ = ["OPS", "Budget", "Case", "OpSpec", "Refusal"]

Inputs = dict[str, Any]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Budget:
    """How far an operator may be from its float64 oracle, in terms of the same-precision naive form.

    max|op - oracle| <= factor * max|naive - oracle| + ulps * unit roundoff * max|oracle|, and the same for the root mean
    square. Errors of the first output, counted in units in the last place of its row scale, obey the same with `ulps` units
    of roundoff (two of them are one unit in the last place), so that small rows and columns are judged by their own size.
    On cases marked `bias`, the mean signed error of the first output must stay within `bias` units in the last place of the
    dtype (or within four standard errors of zero, whichever is larger).

    Attributes:
        forward: factor for outputs.
        backward: factor for gradients.
        ulps: absolute slack for outputs in units of the roundoff of the tensor judged, against a naive form that is right
            by luck.
        backward_ulps: the same for gradients, which are differences of terms larger than themselves.
        bias: units in the last place.
    """

    forward: float = 2.0
    backward: float = 3.0
    ulps: float = 2.0
    backward_ulps: float = 8.0
    bias: float = 0.02


@dataclass(frozen=True)
class Case:
    """One set of inputs.

    Attributes:
        name: what is special about it.
        make: a seeded CPU generator -> keyword arguments of the public function; float tensors come in float32.
        grads: the arguments whose gradients are checked.
        fixed: float arguments that stay in the accumulation dtype whatever dtype the case runs in.
        level: "fast" cases run on every machine, "full" ones where there is time.
        bias: the dtypes in which the bias gate judges this case.
        biased: backends that the bias gate leaves out, because they are the plain form and it is biased on this case.
    """

    name: str
    make: Callable[[torch.Generator], Inputs]
    grads: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    level: str = "fast"
    bias: tuple[torch.dtype, ...] = ()
    biased: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """A call that the operator refuses by name, with the reason a user reads."""

    what: str
    why: str


@dataclass(frozen=True)
class OpSpec:
    """Everything that conformance, `attnkit ops`, docs and benchmarks need to know about an operator.

    Attributes:
        name: the public function's name in `attnkit.ops`.
        summary: one line.
        source: paper and equation.
        function: the public function.
        outputs: names of the tensors it returns, in order (with `return_lse=True` where it has that option); tuples in tuples
            count tensor by tensor.
        cases: the conformance cases.
        oracle: float64 inputs -> outputs, from the defining formula, independent of any kernel's decomposition.
        naive: same-dtype inputs -> outputs, the plain form that the error budget refers to; differentiable.
        prepare: the public function's arguments -> the call that backends judge and run.
        backends: in order of preference.
        dtypes: what it takes.
        sites: where the operator's own backends round to 16 bits at most, by the names of `attnkit.lab.numerics`
            (FORWARD_SITES, BACKWARD_SITES); what is not named is kept in the accumulation dtype.
        row_scale: float64 inputs -> the size of the terms that each element of the first output is a sum of, for attention
            sum_j P_ij |V_jd|; None means the size of the element itself.
        invariances: what results must do when inputs change.
        capabilities: capability -> "yes", or a limit in words.
        refusals: calls refused by name.
        budget: error budget.
        arguments: a case's inputs -> arguments of the public function, where the two differ: cases hold tensors, an argument
            may be made of several.
        wide: outputs that are in the accumulation dtype whatever the inputs are in.
    """

    name: str
    summary: str
    source: str
    function: Callable[..., Any]
    outputs: tuple[str, ...]
    cases: tuple[Case, ...]
    oracle: Callable[..., Outputs]
    naive: Callable[..., Outputs]
    prepare: Callable[..., Any]
    backends: tuple[Backend[Any], ...]
    dtypes: tuple[torch.dtype, ...]
    sites: tuple[str, ...]
    row_scale: Callable[..., Tensor] | None = None
    invariances: tuple[Invariance, ...] = ()
    capabilities: Mapping[str, str] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()
    budget: Budget = field(default_factory=Budget)
    arguments: Callable[[Inputs], Inputs] = dict
    wide: tuple[str, ...] = ("lse",)


OPS: Registry[OpSpec] = Registry("operator")
