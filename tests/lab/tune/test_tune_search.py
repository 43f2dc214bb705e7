"""Who is timed, who wins, and who is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnkit._core.triton.configs import Config, ConfigTable
from attnkit._core.triton.probe import Probe
from attnkit.lab.bench import timing
from attnkit.lab.tune.search import Timed, Winner, choose, faithful, race
from attnkit.lab.tune.tunables import Tunable

CPU = torch.device("cpu")
CONFIGS = [Config(16, 16, 1, stages) for stages in range(1, 9)]
PRESENT = CONFIGS[-1]


def probing(run: object, *outputs: str) -> Probe:
    return Probe(run, outputs or ("out",), {}, None, graph=False)  # type: ignore[arg-type]


def test_the_fastest_come_first_and_the_present_one_always_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    last: list[float] = []

    def run(config: Config) -> tuple[Tensor]:
        if config.num_stages == 2:
            raise RuntimeError("out of resource: shared memory\na page more")
        last.append(1e-3 * config.num_stages)
        return (torch.zeros(1),)

    def stopwatch(device: torch.device, call: Callable[[], object], count: int) -> float:
        call()
        return last[-1]

    monkeypatch.setattr(timing, "elapsed", stopwatch)
    final, dropped, notes = race(probing(run), CPU, PRESENT, CONFIGS, rounds=4)
    assert [(timed.config.num_stages, timed.ms) for timed in final] == [(n, pytest.approx(n)) for n in (1, 3, 4, 5, 6, 8)]
    assert [len(timed.times) for timed in final] == [4] * 6
    assert [(out.config.num_stages, out.reason) for out in dropped] == [(2, "RuntimeError: out of resource: shared memory")]
    assert notes == ()


def test_a_race_that_nobody_can_run() -> None:
    def run(config: Config) -> tuple[Tensor]:
        raise torch.OutOfMemoryError

    final, dropped, _ = race(probing(run), CPU, PRESENT, CONFIGS[:2], rounds=3)
    assert final == []
    assert [out.reason for out in dropped] == ["out of memory"] * 2


def test_a_winner_wins_by_more_than_the_spread() -> None:
    noise = (1.0, 1.1, 0.9, 1.05, 0.95)
    present = Timed(PRESENT, noise)
    clear = Timed(CONFIGS[0], [0.5 * t for t in noise])
    slight = Timed(CONFIGS[1], [0.98, 0.98, 0.98, 0.98, 0.98])
    slower = Timed(CONFIGS[2], [1.3 * t for t in noise])
    (winner,) = choose([clear, slight, present, slower], PRESENT)
    assert winner.config == clear.config
    assert (winner.gain, winner.spread) == (pytest.approx(1.0), pytest.approx(0.0))
    assert choose([clear, slight], PRESENT) == [Winner(clear.config, None, None), Winner(slight.config, None, None)]


def judging(truth: dict[str, Tensor], errors: dict[Config, Tensor]) -> dict[Config, str]:
    """Verdicts on outputs that differ from the truth by these errors, in float32."""
    name = next(iter(truth))
    tunable = Tunable("attention", ConfigTable("toy", {}, {}), lambda *_: (), lambda *_: probe, lambda _: truth)
    probe = probing(lambda config: ((truth[name] + errors[config]).float(),), name)
    return faithful(tunable, probe, list(errors))


@pytest.mark.parametrize(("name", "factor"), [("out", 2), ("d_q", 3)])
def test_outputs_must_be_as_exact_as_those_of_the_others(name: str, factor: int) -> None:
    truth = {name: torch.linspace(-1, 1, 1000, dtype=torch.float64)}
    usual = 1e-3 * torch.sin(torch.arange(1000.0, dtype=torch.float64))
    other = 1e-3 * torch.cos(torch.arange(1000.0, dtype=torch.float64))
    spike, nan = other.clone(), other.clone()
    spike[17], nan[3] = 1.1e-3 * factor, torch.nan
    errors = dict(zip(CONFIGS, (usual, other, usual * 0.99 * factor, usual * 1.02 * factor, spike, nan), strict=False))
    verdicts = list(judging(truth, errors).values())
    assert verdicts[:3] == ["", "", ""]
    assert verdicts[3].startswith(f"largest error of {name} is {1.02 * factor * 1e-3:.1e}, allowed ")
    assert verdicts[4].startswith("largest error")
    assert "inf" in verdicts[5]
    assert list(judging(truth, dict(list(errors.items())[::-1])).values())[::-1] == verdicts, "order says nothing"


def test_an_error_that_is_spread_out_is_seen_too() -> None:
    truth = {"out": torch.linspace(-1, 1, 1000, dtype=torch.float64)}
    rare = torch.zeros(1000, dtype=torch.float64)
    rare[5] = 1e-3
    verdicts = judging(truth, {CONFIGS[0]: rare, CONFIGS[1]: torch.full_like(rare, 1e-3)})
    assert verdicts[CONFIGS[1]].startswith("rms error of out")


def test_one_rounding_is_no_difference() -> None:
    truth = {"out": torch.ones(8, dtype=torch.float64)}
    exact = torch.zeros(8, dtype=torch.float64)
    verdicts = judging(truth, {CONFIGS[0]: exact, CONFIGS[1]: exact + 2**-23, CONFIGS[2]: exact + 2**-21})
    assert [bool(why) for why in verdicts.values()] == [False, False, True]
