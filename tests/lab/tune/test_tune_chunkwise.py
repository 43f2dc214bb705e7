"""What is tried for the kernels of recurrences in chunks, and what each is measured on."""

from typing import Any

import pytest
import torch

from attnkit._core.errors import OptionError
from attnkit._core.triton import interpreted
from attnkit._core.triton.configs import Config
from attnkit.lab.tune.search import faithful
from attnkit.lab.tune.tunables import TUNABLES

launch = pytest.importorskip("attnkit.ops._chunkwise_core._triton.launch")
MLSTM = TUNABLES["mlstm"]()
KEYS = MLSTM.table.keys()
KERNELS = ("walk", "outputs", "d_queries", "d_keys", "d_values")
KIB = 1024
CPU = torch.device("cpu")


def test_the_table_has_the_kernels() -> None:
    assert tuple(dict.fromkeys(key[0] for key in KEYS)) == KERNELS


@pytest.mark.parametrize("key", KEYS, ids=lambda key: "-".join(map(str, key)))
def test_candidates_are_few_and_not_sure_to_fail(key: tuple[str, int, int]) -> None:
    kernel, bits, width = key
    found = MLSTM.candidates(*key, 227 * KIB)
    assert 12 <= len(found) <= 54
    assert len(set(found)) == len(found)
    assert MLSTM.table.pick(*key, CPU) in found
    fewer = MLSTM.candidates(*key, 64 * KIB)
    assert set(fewer) <= set(found)
    for config in fewer:  # a step of the pipeline
        stays, walked = (64 if bits == 16 else 32, config.block_m) if kernel == "walk" else (config.block_m, width)
        assert bits // 8 * stays * (walked + config.block_n) * max(config.num_stages - 1, 1) <= 64 * KIB
    for config in found:
        if kernel == "walk":
            assert config.block_m <= max(width, 16)
        else:
            sums = {"d_queries": 2 * width, "d_keys": width}.get(kernel, config.block_n)
            assert config.block_m * sums // (32 * config.num_warps) <= 255
            assert width > 16 or bits == 32 or config.block_m == 32, "64 rows of keys of width 16 are compiled wrongly"


def test_less_shared_memory_leaves_fewer_candidates() -> None:
    sizes = [len(MLSTM.candidates("d_keys", 16, 256, shared * KIB)) for shared in (227, 99, 48)]
    assert sizes[0] > sizes[1] > sizes[2]
    assert Config(64, 64, 8, 2) in MLSTM.candidates("d_queries", 16, 256, 227 * KIB)
    assert Config(64, 64, 4, 2) not in MLSTM.candidates("d_queries", 16, 256, 227 * KIB), "256 accumulators a thread"


@pytest.mark.skipif(not interpreted(), reason="only the interpreter runs kernels on the CPU")
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_probe_runs_its_kernel_alone_with_the_configuration_given(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = MLSTM.probe(kernel, torch.float32, 16, CPU)
    seen: list[Any] = []
    run = launch.launch

    def launched(function: Any, grid: Any, arguments: Any, flags: dict[str, Any], **options: int) -> None:
        tile = [flags[name] for name in ("BLOCK_M", "BLOCK_K", "BLOCK_V") if name in flags]
        seen.append((function.__name__, *tile, *options.values()))
        run(function, grid, arguments, flags, **options)

    monkeypatch.setattr(launch, "launch", launched)
    config, other = Config(16, 16, 2, 3), Config(32, 32, 4, 1)
    outputs = probe.run(config)
    assert seen == [(kernel, 16, 16, 2, 3)] * (2 if kernel == "walk" else 1)
    assert len(outputs) == len(probe.outputs)
    assert (probe.upstream is None) == (kernel == "outputs")
    assert faithful(MLSTM, probe, [config, other]) == {config: "", other: ""}
    whole = probe.run
    wrong = Config(16, 32, 2, 3)
    object.__setattr__(probe, "run", lambda c: (*whole(c)[:-1], whole(c)[-1] * (1.001 if c == wrong else 1)))
    verdicts = faithful(MLSTM, probe, [config, wrong])
    assert verdicts[config] == ""
    assert f"error of {probe.outputs[-1]}" in verdicts[wrong]


@pytest.mark.skipif(not interpreted(), reason="only the interpreter runs kernels on the CPU")
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_probe_is_the_operator(kernel: str) -> None:
    """Its outputs are those of the operator in float64, not only alike among configurations."""
    probe = MLSTM.probe(kernel, torch.float32, 16, CPU)
    truth = MLSTM.truth(probe)
    for name, found in zip(probe.outputs, probe.run(Config(16, 16, 2, 1)), strict=True):
        wanted = truth[name]
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_unknown_kernels_are_named() -> None:
    with pytest.raises(OptionError, match="unknown kernel 'fwd'; choose one of walk, outputs, d_queries, d_keys, d_values"):
        MLSTM.probe("fwd", torch.float32, 16, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_probes_on_a_gpu_fill_it(kernel: str) -> None:
    probe = MLSTM.probe(kernel, torch.bfloat16, 128, torch.device("cuda", 0))
    q, v = probe.inputs["q"], probe.inputs["v"]
    assert (*q.shape, v.shape[-1]) == (4, 4096, 16, 128, 256)
    config = MLSTM.table.pick(kernel, 16, 128, q.device)
    assert faithful(MLSTM, probe, [config]) == {config: ""}
