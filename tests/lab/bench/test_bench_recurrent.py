"""The races of recurrences on a CPU: peers as far as their code goes there, their packages played by our own operators."""

import sys
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from bench_examples import CPU
from torch import Tensor

from attnkit import ops
from attnkit._core.errors import OptionError
from attnkit._core.opspec import Case
from attnkit.lab import bench
from attnkit.lab.bench import RACES, Shape
from attnkit.lab.bench.race import contestants
from attnkit.lab.numerics import conformance
from attnkit.ops import RecurrentState


def shape(op: str, step: str, length: int = 128, heads: tuple[int, int] = (2, 2), **vary: Any) -> Shape:
    race = RACES[op]
    (variant,) = race.choose_variants({name: [value] for name, value in vary.items()})
    return Shape(step, race.sizes(step, length, 16, heads, 1), torch.float32, CPU, variant)


def judge(op: str, peer: str, where: Shape) -> list[conformance.Row]:
    race = RACES[op]
    case = Case(str(where), partial(race.inputs, where), race.grads if where.trains else (), race.fixed)
    rows = conformance.check(ops.OPS[op], case, where.dtype, operator=race.peers[peer].make(where))
    assert rows
    return [row for row in rows if not row.ok]


@pytest.fixture
def nxai(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Heads first, gates of a step [B, H, 1], states C, n and m [B, H, 1]."""
    asked: list[str] = []

    def get_kernel(name: str) -> Any:
        asked.append(name)
        sigmoid = name.endswith("siging")

        def kernel(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, *, normalize: bool = True, **options: Any) -> Any:
            assert (options["chunk_size"], options["return_last_states"]) == (128, True)
            rows = (t.transpose(1, 2) for t in (q, k, v, i, f))
            out, state = ops.mlstm(*rows, input_gate="sigmoid" if sigmoid else "exp", normalize=normalize)
            n = torch.zeros_like(q[:, :, 0]) if state.n is None else state.n
            return out.transpose(1, 2), (state.S, n) if sigmoid else (state.S, n, state.m[..., None])  # type: ignore[index]

        return kernel

    def step(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, c: Tensor, n: Tensor, m: Tensor) -> Any:
        out, new = ops.mlstm_step(q, k, v, i[..., 0], f[..., 0], RecurrentState(c, n, m[..., 0]))
        assert new.m is not None
        return out, (new.S, new.n, new.m[..., None])

    package, module = ModuleType("mlstm_kernels"), ModuleType("mlstm_kernels.torch")
    vars(module).update(get_mlstm_kernel=get_kernel, get_mlstm_step_kernel=lambda name: step)
    monkeypatch.setitem(sys.modules, "mlstm_kernels", package)
    monkeypatch.setitem(sys.modules, "mlstm_kernels.torch", module)
    return asked


@pytest.fixture
def _fla(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk(q: Tensor, k: Tensor, v: Tensor, g: Any = None, g_gamma: Any = None, output_final_state: bool = False) -> Any:
        assert output_final_state
        g = g_gamma.expand(k.shape[:-1]) if g is None else g
        out, state = ops.scalar_decay_attention(q, k, v, g)
        return out, state.S

    def recurrent(q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, output_final_state: bool) -> Any:
        out, state = ops.scalar_decay_attention(q, k, v, g, initial_state=RecurrentState(initial_state))
        return out, state.S

    module = ModuleType("fla.ops.simple_gla")
    vars(module).update(chunk_simple_gla=chunk, fused_recurrent_simple_gla=recurrent)
    for name, found in (("fla", ModuleType("fla")), ("fla.ops", ModuleType("fla.ops")), ("fla.ops.simple_gla", module)):
        monkeypatch.setitem(sys.modules, name, found)


@pytest.mark.parametrize("gates", ["exp", "sigmoid", "plain"])
@pytest.mark.parametrize("step", ["fwd", "fwd+bwd"])
def test_kernels_of_the_mlstm(nxai: list[str], gates: str, step: str) -> None:
    assert judge("mlstm", "mlstm-kernels", shape("mlstm", step, gates=gates)) == []
    assert nxai == [f"chunkwise--triton_xl_chunk{'' if gates == 'exp' else '_siging'}"]


@pytest.mark.usefixtures("_fla")
@pytest.mark.parametrize("step", ["fwd", "fwd+bwd"])
def test_simple_gla(step: str) -> None:
    assert judge("mlstm", "fla", shape("mlstm", step, gates="plain")) == []
    assert judge("scalar_decay_attention", "fla", shape("scalar_decay_attention", step)) == []
    assert judge("lightning_attention", "fla", shape("lightning_attention", "fwd")) == []


@pytest.mark.usefixtures("nxai", "_fla")
def test_steps() -> None:
    assert judge("mlstm_step", "mlstm-kernels", shape("mlstm_step", "step", 1)) == []
    assert judge("scalar_decay_step", "fla", shape("scalar_decay_step", "step", 1)) == []


def test_peers_say_what_they_cannot_do() -> None:
    def limits(op: str, peer: str, where: Shape) -> str:
        return "; ".join(RACES[op].peers[peer].limits(where))

    assert "multiples of 128" in limits("mlstm", "mlstm-kernels", shape("mlstm", "fwd", 100))
    assert "share a state" in limits("mlstm", "mlstm-kernels", shape("mlstm", "fwd", heads=(4, 2)))
    assert "without a normaliser" in limits("mlstm", "fla", shape("mlstm", "fwd"))
    assert limits("mlstm", "fla", shape("mlstm", "fwd", gates="plain")) == ""
    assert "exponential gates only" in limits("mlstm_step", "mlstm-kernels", shape("mlstm_step", "step", gates="plain"))
    assert "is not installed" in RACES["mlstm"].peers["mlstm-kernels"].reasons(shape("mlstm", "fwd"))[0]
    assert "who runs forward" in limits("mlstm", "mlstm-kernels-unjudged", shape("mlstm", "fwd"))
    assert "multiples of 128" in limits("mlstm", "mlstm-kernels-unjudged", shape("mlstm", "fwd+bwd", 100))
    assert limits("mlstm", "mlstm-kernels-unjudged", shape("mlstm", "fwd+bwd")) == ""
    assert [peer.name for peer in contestants(RACES["mlstm"], None, CPU)] == ["sdpa"]
    everybody = [peer.name for peer in contestants(RACES["mlstm"], None, torch.device("cuda"))]
    assert everybody == ["mlstm-kernels", "mlstm-kernels-unjudged", "fla", "sdpa-flash", "cudnn", "fa4"]


@pytest.mark.parametrize("op", ["mlstm", "scalar_decay_attention", "lightning_attention"])
def test_dense_attention_beside_them_runs_both_ways(op: str) -> None:
    document = bench.run(op, lengths=[64], dims=[16], heads=(16, 16), rounds=3)
    assert document["skipped"] == []
    assert [(row["pass"], row["peer"]) for row in document["rows"]] == [("fwd", "sdpa*"), ("fwd+bwd", "sdpa*")]
    assert all(row["tflops"] > 0 for row in document["rows"])


def test_gates_and_states_stay_in_float32() -> None:
    where = shape("mlstm_step", "step", 1)
    inputs = RACES["mlstm_step"].draw(Shape("step", where.sizes, torch.bfloat16, CPU, where.variant), seed=0)
    assert {name for name, value in inputs.items() if getattr(value, "dtype", None) == torch.float32} == set("ifSnm")
    assert RACES["mlstm_step"].traffic(where) == 2 * inputs["S"].nbytes


@pytest.mark.parametrize("op", ["mlstm_step", "scalar_decay_step"])
def test_a_step_is_raced_by_its_bytes(op: str) -> None:
    document = bench.run(op, lengths=[1], dims=[16], heads=(4, 2), batch=2, rounds=3, peers=["attnkit:torch"])
    (row,) = document["rows"]
    assert (row["pass"], row["shape"]["B"]) == ("step", 2)
    assert row["bandwidth_share"] > 0


def test_batches_shrink_as_lengths_grow() -> None:
    race = RACES["mlstm"]
    assert [race.sequences("cuda", length) for length in (512, 8192, 65536, 2**18)] == [128, 8, 1, 1]
    assert race.sequences("cpu", 512) == 1
    assert RACES["mlstm_step"].sequences("cuda", 1) == 32


@pytest.mark.parametrize(("axis", "value"), [("dv", "0"), ("dv", "half"), ("gates", "relu"), ("first", "last")])
def test_other_values_are_refused(axis: str, value: str) -> None:
    with pytest.raises(OptionError, match=f"{axis}={value} of mlstm"):
        bench.run("mlstm", vary={axis: [value]})
