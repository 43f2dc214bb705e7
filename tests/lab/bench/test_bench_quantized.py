"""transformers' QuantizedCache as a peer of ragged decoding, where optimum-quanto lies beside the environment."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_examples import CPU

from attnkit.lab.bench import RACES, Shape

RACE = RACES["ragged_decode_attention"]
ROOT = Path(__file__).parents[3]
FOLDER = ROOT / ".venv" / "peers"
NAMES = ("quantized-cache", "quantized-cache-torch")

# a process of its own: transformers remembers whether quanto is there, and quanto's operators cannot be defined twice
STEPS = """
import json
import torch
from optimum.quanto.tensor.packed import PackedTensor
from attnkit.lab.bench import RACES, Shape, machine, quantized

race, copies = RACES["ragged_decode_attention"], 3
(variant,) = race.choose_variants({"codec": ["int4"], "kept": ["all"]})
shape = Shape("decode", race.sizes("decode", 256, 32, (8, 4), 2), torch.float32, torch.device("cpu"), variant)
machine.cache_bytes = lambda device: 2 * 256 * 4 * 32  # as many copies as caches are asked for
seen = []
attend = quantized.DENSE["sdpa"].make(shape)

def watched(**tensors):
    seen.append(tensors)
    return attend(**tensors)

class Dense:
    make = staticmethod(lambda shape: watched)

quantized.DENSE = {"sdpa": Dense}
with torch.no_grad():
    run = race.peers["quantized-cache-torch"].make(shape)
    arguments = race.arguments(race.draw(shape, 0))
    outs = [run(**arguments) for _ in range(2 * copies)]
generator = torch.Generator().manual_seed(0)
draw = lambda tokens: quantized.normal((2, 4, tokens, 32), generator, torch.float32)
token = [draw(1), draw(1)]
errors, raw, last = [], [], []
for copy in range(copies):
    for name, new in zip("kv", token):
        stored = draw(255)
        got = seen[copy][name].transpose(1, 2)
        errors.append(float((got[:, :, :192] - stored[:, :, :192]).abs().max()))
        raw.append(torch.equal(got[:, :, 192:255], stored[:, :, 192:]))
        last.append(torch.equal(got[:, :, 255:], new))
codes = torch.randint(0, 16, (6, 5), dtype=torch.uint8)
packed = PackedTensor.pack(codes, 4)
print(json.dumps({
    "shapes": [list(tensors["k"].shape) for tensors in seen],
    "again": [torch.equal(outs[i], outs[i + copies]) for i in range(copies)],
    "differ": not torch.equal(outs[0], outs[1]),
    "errors": errors, "raw": raw, "last": last,
    "unpacked": torch.equal(quantized._unpack(packed._data, 4), codes),
}))
"""


def shape(codec: str = "int4", kept: str = "all", length: int = 256) -> Shape:
    (variant,) = RACE.choose_variants({"codec": [codec], "kept": [kept]})
    return Shape("decode", RACE.sizes("decode", length, 32, (8, 4), 2), torch.float32, CPU, variant)


def test_a_step_decodes_everything_and_leaves_the_layer_as_it_was() -> None:
    if not (FOLDER / "optimum").is_dir():
        pytest.skip("optimum-quanto is not installed; run: make .venv/.peers")
    path = os.pathsep.join([str(ROOT / "src"), str(FOLDER), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", STEPS],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["shapes"] == [[2, 256, 4, 32]] * 6  # the step's own token is the 256th, every time
    assert found["again"] == [True] * 3
    assert found["differ"]
    assert all(0.05 < error < 0.5 for error in found["errors"])  # 4 bits of numbers up to 4: half a scale is about 0.25
    assert found["raw"] == found["last"] == [True] * 6
    assert found["unpacked"]


@pytest.mark.parametrize("name", NAMES)
def test_limits(name: str) -> None:
    limits = RACE.peers[name].limits
    assert limits(shape()) == []
    assert limits(shape("int8")) == ["codec=int8 (it is raced with 4 bits)"]
    assert limits(shape(kept="half")) == ["kept=half (it drops nothing)"]
    assert "window of 64" in limits(shape(length=64))[0]


@pytest.mark.parametrize("name", NAMES)
def test_who_is_absent_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "optimum.quanto", None)
    assert RACE.peers[name].reasons(shape())[0].endswith("is not installed; run: pip install optimum-quanto")


def test_quantos_own_kernel_is_not_captured() -> None:
    assert [bool(RACE.peers[name].plain) for name in NAMES] == [True, False]
    assert not any(RACE.peers[name].same_result for name in NAMES)
