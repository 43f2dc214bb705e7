"""FlashAttention-4's adapter without FlashAttention-4: what it refuses, on tensors that only pretend to be on a GPU."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnkit.ops.attention import flash4
from attnkit.ops.attention.call import AttentionCall, prepare


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the package were found, on a machine with a GPU of capability 9.0."""
    monkeypatch.setattr(flash4, "missing", list)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode():
        yield


def _call(
    batch: tuple[int, ...] = (2,),
    rows: int = 65,
    keys: int = 129,
    heads: tuple[int, int] = (4, 2),
    width: int = 64,
    width_v: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    grad: bool = False,
    **options: Any,
) -> AttentionCall:
    shapes = ((rows, heads[0], width), (keys, heads[1], width), (keys, heads[1], width_v or width))
    q, k, v = (torch.empty(*batch, *shape, dtype=dtype, device=device, requires_grad=grad) for shape in shapes)
    return prepare(q, k, v, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "grad": True, "return_lse": True},
        {"causal": True, "rows": 300},  # the last query stands on the last key
        {"window_size": (17, None), "grad": True},
        {"window_size": (17, 40), "dtype": torch.float16},
        {"heads": (14, 2), "width": 128, "grad": True},
        {"width": 80},
        {"width": 256, "grad": True},
        {"width": 192, "width_v": 128},
        {"width": 192, "width_v": 128, "heads": (4, 4), "grad": True},
        {"deterministic": True},
        {"scale": 0.3, "batch": (65535,)},
    ],
    ids=str,
)
@pytest.mark.usefixtures("installed")
def test_takes(options: dict[str, Any]) -> None:
    assert flash4.refuses(_call(**options)) == []


@pytest.mark.usefixtures("installed")
def test_packed_sequences() -> None:
    boundaries = torch.empty(4, dtype=torch.int32, device="cuda")
    call = _call(batch=(), grad=True, causal=True, cu_seqlens_q=boundaries, cu_seqlens_k=boundaries)
    assert flash4.refuses(call) == []
    for other in (torch.empty(4, dtype=torch.int32), torch.empty_strided((4,), (2,), dtype=torch.int32, device="cuda")):
        assert flash4.refuses(replace(call, cu_seqlens_k=other)) == ["cu_seqlens on another device, or strided"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device": "cpu"}, "device cpu"),
        ({"dtype": torch.float32, "out_dtype": torch.float32}, "torch.float32"),
        ({"rows": 0}, "empty inputs"),
        ({"keys": 0}, "empty inputs"),
        ({"batch": (65536,)}, "more than 65535 sequences"),
        ({"rows": 2**23}, "2^31 elements"),
        ({"scale": 0.0}, "scale that is not positive"),
        ({"scale": -1.0}, "scale that is not positive"),
        ({"scale": float("nan")}, "scale that is not positive"),
        ({"softcap": 20.0}, "softcap"),
        ({"out_dtype": torch.float32}, "out_dtype"),
        ({"deterministic": True, "grad": True}, "deterministic gradients"),
        ({"width": 68}, "no multiple of 8"),
        ({"width": 64, "width_v": 128}, "value width differs"),
        ({"width": 192, "width_v": 128, "grad": True}, "gradients of grouped heads"),
        ({"width": 80, "grad": True}, "no multiple of 32"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("installed")
def test_refuses(options: dict[str, Any], reason: str) -> None:
    (only,) = flash4.refuses(_call(**options))
    assert reason in only


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("sinks", (4,), "sinks"),
        ("key_bias", (2, 129), "key_bias"),
        ("q_pos", (65,), "explicit query positions"),
    ],
)
@pytest.mark.usefixtures("installed")
def test_refuses_tensors(name: str, shape: tuple[int, ...], reason: str) -> None:
    dtype = torch.int32 if name == "q_pos" else torch.float32
    options: dict[str, Any] = {name: torch.empty(*shape, dtype=dtype, device="cuda")}
    (only,) = flash4.refuses(_call(**options))
    assert only.startswith(reason)


@pytest.mark.usefixtures("installed")
def test_refuses_expanded_keys() -> None:
    q, k = (torch.empty(1, 65, heads, 64, dtype=torch.bfloat16, device="cuda") for heads in (4, 2))
    assert flash4.refuses(prepare(q, k, k)) == []
    assert flash4.refuses(prepare(q.expand(3, -1, -1, -1), k.expand(3, -1, -1, -1), k.expand(3, -1, -1, -1))) == [
        "expanded inputs"
    ]


@pytest.mark.parametrize("arch", [(8, 0), (8, 9), (10, 0), (12, 0)])
@pytest.mark.usefixtures("installed")
def test_refuses_other_gpus(arch: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: arch)
    (reason,) = flash4.refuses(_call())
    assert reason.startswith(f"compute capability {arch[0]}.{arch[1]}")


@pytest.mark.usefixtures("installed")
def test_gradients_count_only_where_autograd_records() -> None:
    call = _call(width=80, grad=True)
    with torch.no_grad():
        assert flash4.refuses(call) == []
    assert flash4.refuses(call)


def test_found_without_being_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def state() -> list[str]:
        flash4._search.cache_clear()
        return flash4.missing()

    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in flash4.PACKAGES:  # a GPU session may hold the real ones
        monkeypatch.delitem(sys.modules, name, raising=False)
    call = prepare(*(torch.randn(1, 5, 2, 16) for _ in range(3)))
    try:
        for name in ("cutlass", "quack", "tvm_ffi", "flash_attn"):
            assert name in state()
            assert name in flash4.refuses(call)[0]
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("raise AssertionError('imported')\n")
        assert state() == ["flash_attn.cute", "flash-attn-4"]  # FlashAttention-2 alone looks like this
        (tmp_path / "flash_attn" / "cute").mkdir()
        (tmp_path / "flash_attn" / "cute" / "interface.py").touch()
        assert state() == ["flash-attn-4"]
        record = tmp_path / "flash_attn_4-4.0.0b36.dist-info"
        record.mkdir()
        (record / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn-4\nVersion: 4.0.0b36\n")
        assert state() == []
        assert flash4.refuses(call) == ["device cpu", "torch.float32 (it takes 16 bits)"]
    finally:
        flash4._search.cache_clear()
