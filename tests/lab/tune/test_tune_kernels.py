"""What is tried for the attention kernels, and what each is measured on."""

from typing import Any

import pytest
import torch

from attnkit._core.errors import OptionError
from attnkit._core.triton import interpreted
from attnkit._core.triton.configs import Config
from attnkit.lab.tune.search import faithful
from attnkit.lab.tune.tunables import TUNABLES

launch = pytest.importorskip("attnkit.ops._attention_core._triton.launch")
ATTENTION = TUNABLES["attention"]()
KEYS = ATTENTION.table.keys()
KERNELS = tuple(dict.fromkeys(key[0] for key in KEYS))
KIB = 1024
CPU = torch.device("cpu")


@pytest.mark.parametrize("key", KEYS, ids=lambda key: "-".join(map(str, key)))
def test_candidates_are_few_and_not_sure_to_fail(key: tuple[str, int, int]) -> None:
    kernel, bits, width = key
    found = ATTENTION.candidates(*key, 227 * KIB)
    assert 12 <= len(found) <= 40
    assert len(set(found)) == len(found)
    for shared in (99 * KIB, 48 * KIB):
        fewer = ATTENTION.candidates(*key, shared)
        assert set(fewer) <= set(found)
        for config in fewer:  # one step at least, and what stays
            stays, walked = (config.block_n, config.block_m) if kernel.endswith("dkdv") else (config.block_m, config.block_n)
            kept = 1 if kernel in ("fwd", "decode", "gather_fwd") else 2
            assert bits // 8 * width * (kept * stays + 2 * walked * max(config.num_stages - 1, 1)) <= shared
    for config in found:
        stays, walked = (config.block_n, config.block_m) if kernel.endswith("dkdv") else (config.block_m, config.block_n)
        sums = {"dq": width + 2 * walked, "dkdv": 2 * (width + walked)}
        assert stays * sums.get(kernel.split("_")[-1], width + walked) // (32 * config.num_warps) <= 255
        assert 16 <= walked <= 128
        assert stays == 16 if kernel == "decode" else stays <= 256


def test_less_shared_memory_leaves_fewer_candidates() -> None:
    sizes = [len(ATTENTION.candidates("fwd", 16, 128, shared * KIB)) for shared in (227, 99, 48)]
    assert sizes[0] > sizes[1] > sizes[2] > 0
    found = ATTENTION.candidates("bwd_dkdv", 16, 128, 227 * KIB)
    assert Config(64, 128, 8, 2) in found
    assert Config(128, 64, 8, 2) in found
    assert Config(64, 128, 4, 2) not in found, "384 accumulators a thread"


def test_a_fast_gpu_s_own_entries_are_among_the_candidates() -> None:
    for key, config in ATTENTION.table._by_architecture[9, 0].items():
        assert config in ATTENTION.candidates(*key, 227 * KIB), key


class Recorder:
    """A kernel that writes down that it was launched, and with what."""

    def __init__(self, kernel: Any, name: str, seen: list[Any]) -> None:
        self._kernel, self._name, self._seen = kernel, name, seen

    def __getitem__(self, grid: Any) -> Any:
        def launched(*args: Any, **options: Any) -> Any:
            blocks = tuple(options.get(name) for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"))
            self._seen.append((self._name, *blocks) if self._name != "combine" else self._name)
            return self._kernel[grid](*args, **options)

        return launched


@pytest.mark.skipif(not interpreted(), reason="only the interpreter runs kernels on the CPU")
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_probe_runs_its_kernel_alone_with_the_configuration_given(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = ATTENTION.probe(kernel, torch.float32, 16, CPU)
    seen: list[Any] = []
    for module, names in ((launch.kf, ("fwd", "combine")), (launch.kb, ("bwd_dq", "bwd_dkdv"))):
        for name in names:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), name, seen))
    config, other = Config(16, 16, 2, 3), Config(32, 16, 4, 1)
    outputs = probe.run(config)
    stages = (
        5 if kernel in ("gather_fwd", "gather_dq") else 3
    )  # indices come as long before their rows as these before their use
    expected = ("fwd" if kernel in ("decode", "gather_fwd") else kernel.replace("gather", "bwd"), 16, 16, 2, stages)
    assert seen == ([expected, "combine"] if kernel == "decode" else [expected])
    assert len(outputs) == len(probe.outputs)
    assert (probe.upstream is None) == (kernel in ("fwd", "decode", "gather_fwd"))
    assert probe.graph == (kernel == "decode")
    assert faithful(ATTENTION, probe, [config, other]) == {config: "", other: ""}
    wrong = Config(16, 32, 2, 3)
    run = probe.run
    object.__setattr__(probe, "run", lambda c: (*run(c)[:-1], run(c)[-1] * (1.001 if c == wrong else 1)))
    verdicts = faithful(ATTENTION, probe, [config, wrong])
    assert verdicts[config] == ""
    assert f"error of {probe.outputs[-1]}" in verdicts[wrong]


def test_unknown_kernels_are_named() -> None:
    with pytest.raises(OptionError, match="unknown kernel 'bwd'; choose one of fwd, decode, bwd_dq, bwd_dkdv, gather"):
        ATTENTION.probe("bwd", torch.float32, 16, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_probes_on_a_gpu_fill_it(kernel: str) -> None:
    probe = ATTENTION.probe(kernel, torch.bfloat16, 64, torch.device("cuda", 0))
    q, k = probe.inputs["q"], probe.inputs["k"]
    assert (q.shape[1], k.nbytes * 2) == ((1, 2**28) if kernel == "decode" else (8192, 2 * q.nbytes))
    config = ATTENTION.table.pick(kernel, 16, 64, q.device)
    assert faithful(ATTENTION, probe, [config]) == {config: ""}
