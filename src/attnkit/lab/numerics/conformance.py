"""Conformance: every operator, case, dtype and backend against a float64 oracle, forward and gradients.

An operator passes where its error stays within its budget (`attnkit._core.opspec.Budget`): a multiple of the error that
the plain form of the same precision makes on the same inputs, measured here and now, plus a little rounding. No tolerance
is set by hand. What must be exact is judged exactly: NaN never appears where the oracle is finite, infinities agree.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnkit._core.opspec import Case, OpSpec
from attnkit._core.settings import settings
from attnkit.ops import OPS

__all__ = ["Row", "check", "plan", "run"]

Results = dict[str, Tensor]
Run = Callable[..., Any]


@dataclass(frozen=True)
class Row:
    """One judged quantity.

    Attributes:
        quantity: an output's name, "d_" and an input's name for a gradient, "bias" for the bias gate.
        error: maximum error against the float64 oracle ("bias": mean signed error in units in the last place).
        budget: what is allowed.
        naive_error: the same for the plain form of the same precision.
        note: what went wrong, where it can be said better than with two numbers.
    """

    op: str
    case: str
    dtype: str
    backend: str
    quantity: str
    error: float
    budget: float
    naive_error: float
    ok: bool
    note: str = ""


def run(
    names: Sequence[str] | None = None,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
    device: str | torch.device = "cpu",
    level: str = "fast",
    backends: Sequence[str] | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Check operators (all of them by default) and return every judged quantity.

    Args:
        names: operators of `attnkit.ops`.
        level: "fast" or "full" cases.
        backends: only these; default all. A backend that refuses a call is not judged on it.
        on_row: called as each row is ready.
    Raises:
        OptionError: an unknown operator.
    """
    rows = []
    for spec, case, dtype in _cells(names, dtypes, level):
        for row in check(spec, case, dtype, device=device, backends=backends):
            rows.append(row)
            if on_row:
                on_row(row)
    return rows


def plan(names: Sequence[str] | None = None, *, dtypes: Sequence[torch.dtype], level: str = "fast") -> int:
    """How many (operator, case, dtype) cells `run` would go through, for progress."""
    return sum(1 for _ in _cells(names, dtypes, level))


def _cells(
    names: Sequence[str] | None, dtypes: Sequence[torch.dtype], level: str
) -> Iterator[tuple[OpSpec, Case, torch.dtype]]:
    for name in names or list(OPS):
        spec = OPS[name]
        for case in spec.cases:
            if level == "full" or case.level == "fast":
                yield from ((spec, case, dtype) for dtype in dtypes if dtype in spec.dtypes)


def check(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    *,
    device: str | torch.device = "cpu",
    backends: Sequence[str] | None = None,
    operator: Run | None = None,
) -> list[Row]:
    """Judge one case in one dtype on every backend that takes it, or one given `operator` in their place."""
    low = _inputs(case, dtype, device)
    high = {name: value.double() if _is_float(value) else value for name, value in low.items()}
    weights = torch.Generator().manual_seed(1)
    with _full_precision(device):
        oracle = _evaluate(spec, spec.oracle, _retarget(high, torch.float64), case, weights)
        naive = _evaluate(spec, spec.naive, low, case, weights)
        rows = []
        for name, function in _operators(spec, low, backends, operator):
            results = _evaluate(spec, function, low, case, weights)
            rows += [_judge(spec, case, dtype, name, key, results[key], oracle[key], naive[key]) for key in oracle]
            if case.bias:
                rows.append(_judge_bias(spec, case, dtype, name, results["out"], oracle["out"], naive["out"]))
    return rows


def _inputs(case: Case, dtype: torch.dtype, device: str | torch.device) -> dict[str, Any]:
    """Draw in float32 on the CPU, so that every device sees the same numbers, then round to the dtype under test."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    inputs = case.make(generator)
    if dtype == torch.float64:
        inputs = _retarget(inputs, torch.float64)
    fixed = torch.promote_types(dtype, torch.float32)
    for name, value in inputs.items():
        if _is_float(value):
            inputs[name] = value.to(device, fixed if name in case.fixed else dtype)
        elif isinstance(value, Tensor):
            inputs[name] = value.to(device)
    return inputs


def _retarget(inputs: dict[str, Any], out_dtype: torch.dtype) -> dict[str, Any]:
    return inputs | {"out_dtype": out_dtype} if "out_dtype" in inputs else inputs


def _operators(
    spec: OpSpec, inputs: dict[str, Any], only: Sequence[str] | None, operator: Run | None
) -> Iterator[tuple[str, Run]]:
    if operator is not None:
        yield "given", operator
        return
    disabled = settings().disable
    for backend in spec.backends:
        wanted = only is None or backend.name in only
        if wanted and f"{spec.name}.{backend.name}" not in disabled and not backend.refuses(spec.prepare(**inputs)):
            yield backend.name, lambda name=backend.name, **kwargs: spec.function(**kwargs, backend=name)


def _evaluate(spec: OpSpec, function: Run, inputs: dict[str, Any], case: Case, generator: torch.Generator) -> Results:
    """Outputs, and gradients of a fixed random weighting of all outputs."""
    generator.manual_seed(1)
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in case.grads}
    outputs = function(**inputs | leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {name: output.detach().double().cpu() for name, output in zip(spec.outputs, outputs, strict=False)}
    if leaves:
        loss = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
        for output in outputs:
            weight = torch.randn(output.shape, generator=generator).to(output.device, torch.bfloat16)  # exact in every dtype
            loss = loss + (output.masked_fill(torch.isinf(output), 0).double() * weight).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        results |= {f"d_{name}": grad.double().cpu() for name, grad in zip(leaves, grads, strict=True)}
    return results


def _judge(
    spec: OpSpec, case: Case, dtype: torch.dtype, backend: str, key: str, got: Tensor, oracle: Tensor, naive: Tensor
) -> Row:
    make = partial(Row, spec.name, case.name, str(dtype).removeprefix("torch."), backend, key)
    if got.shape != oracle.shape:
        return make(float("inf"), 0.0, 0.0, False, f"shape {tuple(got.shape)}, expected {tuple(oracle.shape)}")
    finite = torch.isfinite(oracle)
    if not torch.equal(torch.where(finite, 0, got), torch.where(finite, 0, oracle)) or not torch.isfinite(got[finite]).all():
        return make(float("inf"), 0.0, 0.0, False, "NaN or infinities differ from the oracle's")
    if not finite.any():
        return make(0.0, 0.0, 0.0, True)
    gradient = key.startswith("d_")
    budget = spec.budget
    factor, ulps = (budget.backward, budget.backward_ulps) if gradient else (budget.forward, budget.ulps)
    kept = torch.promote_types(dtype, torch.float32) if key in ("lse", *(f"d_{name}" for name in case.fixed)) else dtype
    slack = ulps * torch.finfo(kept).eps / 2 * float(oracle[finite].abs().max())
    error, reference = (got - oracle)[finite], (naive - oracle)[finite]
    worst, allowed = float(error.abs().max()), factor * float(reference.abs().max()) + slack
    spread, allowed_spread = float(error.square().mean().sqrt()), factor * float(reference.square().mean().sqrt()) + slack
    note = "" if spread <= allowed_spread else f"rms {spread:.2e} is over {allowed_spread:.2e}"
    return make(worst, allowed, float(reference.abs().max()), worst <= allowed and not note, note)


def _judge_bias(spec: OpSpec, case: Case, dtype: torch.dtype, backend: str, got: Tensor, oracle: Tensor, naive: Tensor) -> Row:
    """Mean signed error in units in the last place; a row shares its rounding of probabilities, so rows are the samples."""
    ulp = torch.exp2(torch.floor(torch.log2(oracle.abs().clamp(min=1e-30)))) * torch.finfo(dtype).eps
    error, reference = (((t - oracle) / ulp).mean(-1).flatten() for t in (got, naive))
    noise = 4 * float(error.std()) / error.numel() ** 0.5
    bias, allowed = abs(float(error.mean())), max(spec.budget.bias, noise)
    naive_bias = abs(float(reference.mean()))
    name = str(dtype).removeprefix("torch.")
    return Row(spec.name, case.name, name, backend, "bias", bias, allowed, naive_bias, bias <= allowed)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _full_precision(device: str | torch.device) -> Any:
    """Oracles and naive forms in float32 must not be rounded to tf32 on the way."""
    if torch.device(device).type != "cuda" or not torch.backends.cuda.matmul.allow_tf32:
        return nullcontext()
    return _NoTF32()


class _NoTF32:
    def __enter__(self) -> None:
        torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *exc: object) -> None:
        torch.backends.cuda.matmul.allow_tf32 = True
