"""What ragged decode attention publishes about itself."""

from typing import Any

import torch
from torch import Tensor

from attnkit._core.checks import FLOATS
from attnkit._core.invariance import Invariance, alone, scaled
from attnkit._core.opspec import Budget, OpSpec, Refusal
from attnkit.ops.attention.reference import MAX_PAIRS
from attnkit.ops.ragged_decode.api import ragged_decode_attention
from attnkit.ops.ragged_decode.backends import BACKENDS, WIDEST
from attnkit.ops.ragged_decode.call import prepare
from attnkit.ops.ragged_decode.cases import CASES, UNUSED, arguments
from attnkit.ops.ragged_decode.reference import dense, reference

__all__ = ["SPECS"]


def _outputs(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    call = prepare(*args, **kwargs)
    out, lse = reference(call)
    return (out, lse) if call.return_lse else (out,)


def _row_scale(*args: Any, **kwargs: Any) -> Tensor:
    """Sum of p_ij |v_jd|, the size of what is summed."""
    call = prepare(*args, **kwargs)
    keys, values, seen = call.pages.materialize(call.q.dtype)
    return dense(call, keys, values.abs(), seen)[0]


def _moved(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same pages elsewhere in the pool."""
    table = inputs["table"]
    order = torch.randperm(inputs["keys"].shape[0], generator=torch.Generator().manual_seed(0)).to(table.device)
    pool = ("keys", "values", "key_scale", "key_zero", "value_scale", "value_zero", "bias")
    place = order.argsort().int()
    used = table != UNUSED
    table = torch.where(used, place[table.masked_fill(~used, 0).long()], table)
    return inputs | {name: inputs[name][order] for name in pool if name in inputs} | {"table": table}


_ROWS = dict.fromkeys(("q", "table", "lengths", "tail_keys", "tail_values", "tail_lengths", "tail_bias"), 0)
SPECS = (
    OpSpec(
        name="ragged_decode_attention",
        summary="attention over pages of keys, raw or in 8 or 4 bits, every head with a number of its own",
        source="Dao et al. 2023 (Flash-Decoding); Kwon et al. 2023 (arXiv:2309.06180); Liu et al. 2024 (arXiv:2402.02750)",
        function=ragged_decode_attention,
        outputs=("out", "lse"),
        cases=CASES,
        oracle=_outputs,
        naive=_outputs,
        prepare=prepare,
        backends=BACKENDS,
        dtypes=FLOATS,
        sites=("P", "O_out"),
        # scales go into queries, so that all tokens of a page share a rounding which does not average out in the LSE
        budget=Budget(forward=3.0),
        row_scale=_row_scale,
        arguments=arguments,
        invariances=(
            Invariance(
                "pages moved", _moved, lambda name, output: output, ("pages of 16, grouped heads", "4 bits"), exact=True
            ),
            scaled("values", ("values around 2",)),
            alone(_ROWS, ("pages and tail",), ("triton",)),
        ),
        capabilities={
            "cpu": "yes, page by page in plain torch; the Triton kernels in the interpreter, float32, when named",
            "cuda": "yes, Triton kernels that read pages where they are, compute capability 8.0",
            "backward": "no: a cache has no gradients",
            "packed": "batch rows and heads store any numbers of tokens",
            "grouped heads": "any H that is a multiple of Hkv; a group's queries read keys once",
            "codes": "8 and 4 bits, fp8 (e4m3): read as they are, multiplied in matrix units",
            "compile": "yes, fullgraph; in CUDA graphs too: nothing is read on the host",
            "head width": f"up to {WIDEST} in the kernels, D != Dv",
            "batch": "a row's output has the same bits alone and in a batch, in the Triton kernels, with the same table width",
            "float64": "CPU and CUDA, in plain torch",
        },
        refusals=(
            Refusal("tensors that require a gradient", "a cache has none; under torch.no_grad() they are taken"),
            Refusal("pages of other sizes than 16, 32, 64 or 128", "kernels cut tiles out of pages"),
            Refusal("scales or zeros that codes lack, and those that raw pages do not need", "nothing is guessed or ignored"),
            Refusal("lengths beyond the table, pages beyond the pool (checked on the CPU)", "they would be read"),
            Refusal(f"widths above {WIDEST} and pools with gaps between numbers, in the kernels", "plain torch serves"),
            Refusal(f'backend="reference" above {MAX_PAIRS} scores a head', "it writes them all down"),
            Refusal("causal masks and windows", "stored keys are older than every query; newer ones are merged by their LSE"),
        ),
    ),
)
