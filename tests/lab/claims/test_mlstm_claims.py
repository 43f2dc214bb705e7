"""The claims of system 2: the verdict on planted losses, and gains against a loop without any stabiliser."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from attnkit._core.errors import OptionError
from attnkit.lab.claims import CLAIMS, run
from attnkit.lab.claims.mlstm_lm import MIXERS
from attnkit.lab.claims.mlstm_transfer import transfer_behaviour
from attnkit.training import new_model

LM, TRANSFER = CLAIMS["mlstm-lm"], CLAIMS["mlstm-transfer"]


def judged(**losses: float) -> Any:
    settings = LM.configure(seeds=(0,))
    names = dict(zip(("softmax", "exp", "sigmoid", "lightning", "gla"), MIXERS, strict=True))
    return LM.conclude(
        settings,
        [
            {
                "arm": names[arm], "length": 256, "seed": 0, "parameters": 1, "step_ms": 1.0, "validation_loss": loss,
                "curve": [[10, loss + 1], [20, loss]],
            }
            for arm, loss in losses.items()
        ],
    )  # fmt: skip


def test_the_verdict() -> None:
    assert judged(softmax=2.0, exp=2.05, sigmoid=2.04, lightning=3.0).verdict.outcome == "holds"
    assert judged(softmax=2.0, exp=2.00, sigmoid=1.97, lightning=3.0).verdict.outcome == "holds in part", "gates 1.5 % apart"
    assert judged(softmax=2.0, exp=2.07, sigmoid=2.07, lightning=2.0).verdict.outcome == "holds in part", "3.5 % over softmax"
    assert judged(softmax=2.0, exp=2.00, sigmoid=2.10, lightning=2.0).verdict.outcome == "does not hold"
    assert judged(softmax=2.0, exp=2.00, lightning=2.0).verdict.outcome == "undecided"
    found = judged(softmax=2.0, exp=2.0, sigmoid=2.1, lightning=2.2)
    assert found.verdict.numbers["sigmoid over exp at 256"] == pytest.approx(0.05)
    assert found.verdict.numbers["lightning over softmax at 256"] == pytest.approx(0.1)
    assert found.tables[0]["rows"][2][3:5] == ["2.100 (2.100 to 2.100)", "+5.00"]


def test_seeds_are_compared_with_themselves() -> None:
    rows = [
        {
            "arm": arm,
            "length": 256,
            "seed": seed,
            "parameters": 1,
            "step_ms": 1.0,
            "validation_loss": loss,
            "curve": [[10, loss]],
        }
        for arm, losses in (("mlstm sigmoid", (2.02, 1.0)), ("mlstm exp", (2.0, 1.01)), ("softmax", (2.0, 1.0)))
        for seed, loss in enumerate(losses)
    ]
    numbers = LM.conclude(LM.configure(seeds=(0, 1)), rows).verdict.numbers
    assert numbers["sigmoid over exp at 256, largest of the seeds"] == pytest.approx(0.01)
    assert numbers["sigmoid over exp at 256, least of the seeds"] == pytest.approx(1 / 1.01 - 1)


def test_models_are_of_one_size() -> None:
    sizes = {
        arm: sum(weight.numel() for weight in new_model(
            vocab_size=257, dim=128, layers=2, heads=4, positions=64, mixer=mixer
        ).parameters())
        for arm, mixer in MIXERS.items()
    }  # fmt: skip
    assert sizes["mlstm exp"] == sizes["mlstm sigmoid"]
    assert max(sizes.values()) < 1.08 * min(sizes.values())


def last_output(q: Any, k: Any, v: Any, i: float, f: float, *, exponential: bool) -> list[float]:
    """The last output of one head in plain numbers, with the state itself instead of one in units of exp(m)."""
    width, out_width = len(q[0]), len(v[0])
    keep = 1 / (1 + math.exp(-f))
    put = math.exp(i) if exponential else 1 / (1 + math.exp(-i))
    state, norm = [[0.0] * out_width for _ in range(width)], [0.0] * width
    for key, value in zip(k, v, strict=True):
        for a in range(width):
            norm[a] = keep * norm[a] + put * key[a]
            state[a] = [keep * state[a][b] + put * key[a] * value[b] for b in range(out_width)]
    read = [x / math.sqrt(width) for x in q[-1]]
    bottom = max(abs(sum(x * y for x, y in zip(read, norm, strict=True))), 1.0) if exponential else 1.0
    return [sum(read[a] * state[a][b] for a in range(width)) / bottom for b in range(out_width)]


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
def test_gains_are_those_of_a_plain_loop(gate: str) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 128, width, generator=draw, dtype=torch.float64) for width in (4, 4, 6))
    gates = (-9.0, -2.0, 3.0, 8.0)
    found = transfer_behaviour(q, k, v, gates, input_gate=gate, normalize=gate == "exp", norm_eps=1e-6)
    size = math.sqrt(sum(x * x for x in v.flatten().tolist()) / v.numel())
    for row, f in enumerate(gates):
        for column, i in enumerate(gates):
            before, after = [], []
            for head in range(3):
                h = last_output(q[head].tolist(), k[head].tolist(), v[head].tolist(), i, f, exponential=gate == "exp")
                mean = sum(h) / len(h)
                variance = sum((x - mean) ** 2 for x in h) / len(h)
                before.append(math.sqrt(sum(x * x for x in h) / len(h)) / size)
                after.append(math.sqrt(variance / (variance + 1e-6)) / size)
            # the eps of the normaliser, which the loop leaves out, is what 1e-4 allows
            for gains, expected in zip(found, (before, after), strict=True):
                assert float(gains[row, column]) == pytest.approx(sorted(expected)[1], rel=1e-4)


def planted(apart: float) -> Any:
    settings = TRANSFER.configure(changes={"gates": "-4,4"}, seeds=(0,))
    gains = [[0.2, 0.5], [0.6, 1.0]]
    rows = [{"gate": gate, "seed": 0, "before": gains, "after": gains} for gate in ("exp", "sigmoid")]
    rows[1] |= {"before": [[0.2, 0.5], [0.6, 3.0]], "after": [[0.2, 0.5], [0.6, 1.0 + apart]]}
    return TRANSFER.conclude(settings, rows)


def test_the_verdict_on_gains() -> None:
    assert planted(0.04).verdict.outcome == "holds"
    assert planted(0.06).verdict.outcome == "does not hold", "three of four points are within the bound"
    assert planted(0.04).verdict.numbers["largest ratio before the norm"] == pytest.approx(3.0)
    assert [figure["title"] for figure in planted(0.0).figures] == [
        f"Gain {where} the norm, {gate} input gate" for where in ("before", "after") for gate in ("exp", "sigmoid")
    ]


def test_trainings_of_several_processes_make_one_result(tmp_path: Path) -> None:
    """Arms that were trained in folders of their own are found in the folder that their runs are copied to, or refused."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{i} times {i % 7} makes {i * (i % 7)}" for i in range(400)), encoding="utf-8")
    changes = {"text": str(text), "layers": "1"}
    settings = LM.configure(quick=True, changes=changes)
    for part, arm in enumerate(MIXERS):
        alone = run(LM, tmp_path / str(part), settings=settings, quick=True, only=arm)
        assert [row["arm"] for row in alone["rows"]] == [arm]
        shutil.copytree(tmp_path / str(part) / "mlstm-lm-runs", tmp_path / "all" / "mlstm-lm-runs", dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in tmp_path.glob("all/mlstm-lm-runs/*/train.json")}
    assert len(before) == len(MIXERS)
    document = run(LM, tmp_path / "all", settings=settings, quick=True, resume=True)
    assert document["complete"]
    assert [row["arm"] for row in document["rows"]] == list(MIXERS)
    assert {path: path.read_bytes() for path in before} == before, "nothing was trained again"
    for name, value in (("steps", "5"), ("dim", "64"), ("step_tokens", "512")):
        (tmp_path / "all" / "mlstm-lm.json").unlink(missing_ok=True)
        with pytest.raises(OptionError, match=r"cannot resume .*train\.json: it was started with"):
            run(LM, tmp_path / "all", settings=LM.configure(quick=True, changes={**changes, name: value}), resume=True)
