"""Whole races on a CPU: rows, refusals, files, going on."""

import json
import subprocess
import time
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from bench_examples import SMALL, peer, race, right
from torch import Tensor

from attnkit._core.errors import BackendUnavailable, OptionError, ShapeError, UnsupportedError
from attnkit._core.events import Event
from attnkit.lab import bench
from attnkit.lab.bench import Race, machine, runner
from attnkit.lab.bench.timing import Entrant

ROOT = Path(__file__).parents[3]


@pytest.fixture
def against(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Race our attention against given peers."""

    def run(*peers: bench.Peer, **options: Any) -> dict[str, Any]:
        monkeypatch.setattr(runner, "RACES", {"attention": race(*peers)})
        return bench.run("attention", **SMALL | options)

    return run


def test_a_race_writes_rows_of_the_schema_and_a_page(tmp_path: Path) -> None:
    document = bench.run("attention", **SMALL | {"lengths": [96, 64]}, out=tmp_path)
    schema = json.loads(resources.files("attnkit.report").joinpath("schemas", "attnkit.race-1.json").read_text("utf-8"))
    jsonschema.validate(document, schema)
    assert json.loads((tmp_path / "attention.json").read_text()) == document
    assert "Race: attention" in (tmp_path / "attention.html").read_text()
    rows = document["rows"]
    assert [(row["pass"], row["shape"].get("S", row["shape"]["T"])) for row in rows] == [
        (step, length) for step in ("fwd", "fwd+bwd", "decode") for length in (64, 96)
    ]
    assert {row["peer"] for row in rows} == {"sdpa"}
    assert {row["backend"] for row in rows} == {"sdpa"}
    assert (document["complete"], document["skipped"], document["device"]) == (True, [], "cpu")
    for row in rows:
        assert row["ratio"] == pytest.approx(row["peer_ms"] / row["ours_ms"])
        assert row["first_call_s"] is None or row["first_call_s"] > 0
    forward, both, decode = rows[0], rows[2], rows[4]
    assert forward["tflops"] * forward["ours_ms"] * 1e9 == pytest.approx(4 * 4 * 16 * 64 * 64 / 2)
    assert both["peer_tflops"] * both["peer_ms"] * 1e9 == pytest.approx(3.5 * 4 * 4 * 16 * 64 * 64 / 2)
    kv_gb_s = 2 * 64 * 2 * 16 * 4 / (decode["ours_ms"] / 1e3) / 1e9
    assert decode["bandwidth_share"] == pytest.approx(kv_gb_s / document["copy_gb_s"])
    assert decode["shape"] == {"B": 1, "T": 1, "S": 64, "H": 4, "Hkv": 2, "D": 16}


def test_the_commit_is_that_of_the_checkout_and_dirty_where_the_package_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    package = tmp_path / "attnkit" / "__init__.py"
    package.parent.mkdir()
    package.touch()
    monkeypatch.setattr(machine.attnkit, "__file__", str(package))
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    (tmp_path / "results.json").touch()  # a race writes its own result while it runs
    assert machine.commit() == git("rev-parse", "HEAD")
    package.write_text("changed")
    assert machine.commit() == git("rev-parse", "HEAD") + "-dirty"


def test_the_commit_of_this_checkout() -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    if head.returncode:
        assert machine.commit() is None
    else:
        assert (machine.commit() or "").removesuffix("-dirty") == head.stdout.strip()


def test_a_package_installed_in_a_checkout_of_others_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "attnkit" / "__init__.py"
    package.parent.mkdir()
    package.touch()
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    monkeypatch.setattr(machine.attnkit, "__file__", str(package))
    assert machine.commit() is None


def test_everybody_gets_the_same_tensors_and_gradients(against: Any) -> None:
    seen: dict[str, set[tuple[int, int]]] = {"a": set(), "b": set()}
    upstream: dict[str, set[int]] = {"a": set(), "b": set()}
    alike: list[float] = []

    def watching(name: str) -> bench.Peer:
        def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
            out = right(q, k, v, causal)
            if q.shape[1] == 300:  # longer than what conformance uses
                seen[name].add((q.data_ptr(), v.data_ptr()))
                out.register_hook(lambda grad: upstream[name].add(grad.data_ptr()))
                out.register_hook(
                    lambda grad: alike.append(abs(torch.corrcoef(torch.stack([grad.flatten(), q.flatten()]))[0, 1]))
                )
            return out

        return peer(name, attend)

    assert len(against(watching("a"), watching("b"), lengths=[300], passes=["fwd+bwd"])["rows"]) == 2
    assert seen["a"] == seen["b"]
    assert upstream["a"] == upstream["b"]
    assert len(seen["a"]) == len(upstream["a"]) == 1
    assert len(alike) > 0
    assert max(alike) < 0.1


def test_who_is_wrong_is_refused_and_not_timed(against: Any) -> None:
    calls: list[int] = []

    def wrong(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        calls.append(q.shape[1])
        return right(q, k, v, causal) * (1 + 1e-4)

    def wrong_gradient(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        out = right(q, k, v, causal)
        return out + 1e-3 * (v.mean() - v.detach().mean())

    document = against(peer("wrong", wrong), peer("slope", wrong_gradient), lengths=[300, 400], passes=["fwd", "fwd+bwd"])
    assert [(row["peer"], row["pass"]) for row in document["rows"]] == [("slope", "fwd")] * 2
    reasons = {(entry["peer"], entry["pass"]): entry["reason"] for entry in document["skipped"]}
    assert len(document["skipped"]) == 6
    assert reasons["wrong", "fwd"].startswith("fails conformance: out: rms ")
    assert reasons["slope", "fwd+bwd"].startswith("fails conformance: d_v")
    assert calls == [300, 256] * 2  # a first call and a verdict a pass; the longer shape is refused by the verdict


def test_who_cannot_run_is_listed_with_the_reason(against: Any) -> None:
    def breaks(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        raise TypeError("\nno such kernel\nmore")

    def hungry(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        if q.shape[1] > 256:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        return right(q, k, v, causal)

    document = against(
        peer("absent", right, module="no_such_package.sub", install="run: pip install it"),
        peer("limited", right, limits=lambda shape: ["too long", "too wide"]),
        bench.Peer("elsewhere", "", lambda shape: right, devices=("cuda",)),
        peer("breaks", breaks),
        peer("hungry", hungry),
        peer("right", right),
        peers=["absent", "limited", "elsewhere", "breaks", "hungry", "right"],
        lengths=[300],
        passes=["fwd"],
    )
    assert [row["peer"] for row in document["rows"]] == ["right"]
    assert {entry["peer"]: entry["reason"] for entry in document["skipped"]} == {
        "absent": "no_such_package is not installed; run: pip install it",
        "limited": "too long; too wide",
        "elsewhere": "runs on cuda only",
        "breaks": "TypeError: no such kernel",
        "hungry": "out of memory",
    }


def test_who_breaks_in_the_rounds_is_named(against: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(self: Entrant) -> float:
        if self.name == "late":
            raise ValueError("too hot")
        return 1.0

    monkeypatch.setattr(Entrant, "measure", measure)
    (entry,) = against(peer("late", right), passes=["fwd"])["skipped"]
    assert (entry["peer"], entry["reason"]) == ("attnkit", "RuntimeError: late broke after its warm-up: ValueError: too hot")


def test_nobody_is_raced_against_an_operator_of_ours_that_is_wrong(against: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Race, "own", lambda self, backend: lambda **inputs: right(**inputs) * 1.01)
    document = against(peer("right", right), passes=["fwd"])
    assert document["rows"] == []
    assert document["finished"] == ["fwd, B=1 T=64 H=4 Hkv=2 D=16"]
    (entry,) = document["skipped"]
    assert entry["peer"] == "attnkit"
    assert entry["reason"].startswith("fails conformance: out")


def test_other_backends_of_ours_can_be_peers() -> None:
    document = bench.run("attention", **SMALL, backend="sdpa", peers=["attnkit:torch"], passes=["fwd"])
    (row,) = document["rows"]
    assert (row["peer"], row["backend"]) == ("attnkit:torch", "sdpa")


def test_the_given_backend_runs() -> None:
    document = bench.run("attention", **SMALL, backend="reference", passes=["decode"])
    assert {row["backend"] for row in document["rows"]} == {"reference"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"peers": ["sdpb"]}, OptionError, "unknown peer 'sdpb'; did you mean 'sdpa'?"),
        ({"peers": ["attnkit:sdpb"]}, OptionError, "attention has no backend 'sdpb'"),
        ({"peers": ["attnkit:torch:stables=delta"]}, OptionError, "attention has no option 'stables'"),
        ({"backend": "sdpb"}, OptionError, "attention has no backend 'sdpb'"),
        ({"backend": "reference", "dims": [16], "passes": ["bwd"]}, OptionError, "unknown pass 'bwd' of attention"),
        ({"dims": [16, 12]}, UnsupportedError, "head width D=12 is outside 16..256"),
        ({"heads": (6, 4)}, ShapeError, "q has 6 heads and k has 4"),
        ({"rounds": 2}, OptionError, "rounds at least 3"),
        ({"lengths": [0]}, OptionError, "must be at least 1"),
        ({"resume": True}, OptionError, "resume=True needs out"),
        ({"vary": {"nb": [4]}}, OptionError, "attention has nothing called 'nb' to vary; known: none"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_anything_runs(
    options: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(machine, "copy_gb_s")  # the first thing that would run
    with pytest.raises(error, match=message.replace("?", r"\?")):
        bench.run("attention", **SMALL | options)


def test_a_backend_that_cannot_run_here_is_refused_with_its_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNKIT_DISABLE", "attention.sdpa")
    with pytest.raises(BackendUnavailable, match=r"attention cannot run fwd, B=1 T=64 .*sdpa: switched off by ATTNKIT_DISABLE"):
        bench.run("attention", **SMALL, backend="sdpa")


def test_an_interrupted_race_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.kind == "step" and event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run("attention", **SMALL, out=tmp_path, on_event=stop)
    kept = json.loads((tmp_path / "attention.json").read_text())
    assert (kept["complete"], [row["pass"] for row in kept["rows"]]) == (False, ["fwd", "fwd+bwd"])
    with pytest.raises(OptionError, match="is an unfinished race; continue it with resume"):
        bench.run("attention", **SMALL, out=tmp_path)
    with pytest.raises(OptionError, match="it was started with rounds=3, this call has 4"):
        bench.run("attention", **SMALL | {"rounds": 4}, out=tmp_path, resume=True)
    events: list[Event] = []
    document = bench.run("attention", **SMALL, out=tmp_path, resume=True, on_event=events.append)
    assert document["rows"][:2] == kept["rows"]
    assert document["copy_gb_s"] == kept["copy_gb_s"]
    assert document["wall_s"] > kept["wall_s"]
    assert [row["pass"] for row in document["rows"]] == ["fwd", "fwd+bwd", "decode"]
    assert [(event.kind, event.done, event.total) for event in events] == [("plan", 2, 3), ("step", 3, 3)]


def test_first_calls_are_recorded_of_everybody(against: Any) -> None:
    def slow_to_make(shape: bench.Shape) -> Any:
        time.sleep(0.2 if shape.sizes["T"] == 300 else 0)
        return right

    peers = (bench.Peer("slow", "", slow_to_make, devices=("cpu",)), peer("right", right))
    document = against(*peers, lengths=[300], passes=["fwd+bwd"])
    first = {row["peer"]: row["peer_first_call_s"] for row in document["rows"]}
    assert first["slow"] > 0.2 > first["right"] > 0


def test_a_baseline_is_timed_and_marked_and_not_judged(against: Any, tmp_path: Path) -> None:
    def half(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return right(q, k, v, causal) / 2

    baseline = peer("half", half, same_result=False)
    document = against(baseline, peer("right", right), passes=["fwd+bwd"], out=tmp_path)
    marked, plain = document["rows"]
    assert (marked["peer"], plain["peer"]) == ("half*", "right")
    assert marked["note"] == "half* computes something else: for tests"
    assert "note" not in plain
    assert marked["peer_ms"] > 0
    assert marked["peer_peak_mib"] is not None
    assert "peer_tflops" in plain
    assert "peer_tflops" not in marked  # it does other work
    assert document["skipped"] == []
    page = (tmp_path / "attention.html").read_text()
    assert page.count("half*") >= 3  # plot, table and what it is
    assert "half* computes something else" in page


def test_an_unfinished_race_keeps_what_was_measured(against: Any, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.kind == "step":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        against(peer("right", right), passes=["fwd", "decode"], out=tmp_path, on_event=stop)
    document = against(peer("right", right), passes=["fwd", "decode"], out=tmp_path, resume=True)
    assert [(row["peer"], row["pass"]) for row in document["rows"]] == [("right", "fwd"), ("right", "decode")]


@pytest.mark.gpu
def test_on_a_gpu_all_passes_are_raced_and_decoding_is_replayed() -> None:
    document = bench.run("attention", lengths=[1024], dims=[64], rounds=3, device="cuda", peers=["sdpa-flash", "cudnn", "flex"])
    rows = {(row["peer"], row["pass"]): row for row in document["rows"]}
    assert {("sdpa-flash", "fwd"), ("sdpa-flash", "fwd+bwd"), ("sdpa-flash", "decode")} <= set(rows), document["skipped"]
    assert "sdpa-flash: plain calls" not in rows["sdpa-flash", "decode"].get("note", "")
    assert rows["sdpa-flash", "fwd"]["peak_mib"] >= 4  # the output, [1, 1024, 32, 64] in 16 bits
    assert document["copy_gb_s"] > 100
