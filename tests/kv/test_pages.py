"""The store of a compressed layer against lists of tokens."""

import pytest
import torch

from attnkit.kv.codecs import Raw
from attnkit.kv.context import Stored
from attnkit.kv.pages import PagePool, PageStore
from attnkit.kv.selectors import Kept

BATCH, HEADS, WIDTH = 2, 3, 4


def tokens(start, stop):
    """Keys that say which row, head and token they are, and values that are their negatives."""
    row, head, token = torch.meshgrid(torch.arange(BATCH), torch.arange(HEADS), torch.arange(start, stop), indexing="ij")
    keys = (row * 100_000 + head * 10_000 + token)[..., None].expand(-1, -1, -1, WIDTH).float()
    return keys, -keys


def plain(length, bias=False):
    keys, values = tokens(0, length)
    return Stored(keys, values, torch.arange(length)[None, None], None, keys[..., 0] / 7 if bias else None)


def said(view):
    """Which tokens each head holds: what their keys say, after values, positions and bias have been found to agree."""
    token = view.keys[..., 0].long() % 10_000
    row, head = torch.arange(BATCH)[:, None, None], torch.arange(HEADS)[None, :, None]
    assert torch.equal(
        (view.keys[..., 0].long() - token)[view.real], (row * 100_000 + head * 10_000).expand_as(token)[view.real]
    )
    assert torch.equal(view.values[view.real], -view.keys[view.real])
    assert torch.equal(view.positions[view.real], token[view.real])
    return [[token[b, h][view.real[b, h]].tolist() for h in range(HEADS)] for b in range(BATCH)]


def build(mask, size=16, bias=False):
    return PageStore.build(plain(mask.shape[-1], bias), Kept.of_mask(mask), codec=Raw(), page_size=size)


def listed(mask):
    return [[torch.nonzero(mask[b, h])[:, 0].tolist() for h in range(HEADS)] for b in range(BATCH)]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
def test_build_and_view(length, share):
    torch.manual_seed(0)
    mask = torch.rand(BATCH, HEADS, length) < share
    store = build(mask)
    assert said(store.view()) == listed(mask)
    assert torch.equal(store.lengths.long(), mask.sum(-1))


@pytest.mark.parametrize("width", [1, 16, 33, 48])
def test_heads_alike_need_no_lengths(width):
    index = torch.arange(0, 2 * width, 2).expand(BATCH, HEADS, width)
    store = PageStore.build(plain(2 * width), Kept(index), codec=Raw(), page_size=16)
    assert said(store.view()) == [[list(range(0, 2 * width, 2))] * HEADS] * BATCH
    assert store.pool.used == BATCH * HEADS * (width // 16)  # not one page too many


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("step", [1, 3, 16, 50])
def test_append_crop_and_append_again(step, ragged):
    torch.manual_seed(0)
    mask = torch.rand(BATCH, HEADS, 70) < 0.4 if ragged else torch.ones(BATCH, HEADS, 70, dtype=torch.bool)
    store = build(mask, bias=True)
    expected, before = listed(mask), listed(mask)
    for start in range(70, 170, step):
        store.append(*tokens(start, start + step), start)
        expected = [[held + list(range(start, start + step)) for held in row] for row in expected]
    assert said(store.view()) == expected
    view = store.view()
    old = (view.positions < 70) & view.real
    assert torch.equal(view.bias[old], view.keys[..., 0][old] / 7)
    assert not view.bias[view.real & ~old].any()
    added = len(expected[0][0]) - len(before[0][0])
    store.crop(added // 2)
    assert said(store.view()) == [[held[: len(held) - added // 2] for held in row] for row in expected]
    start = 70 + added - added // 2
    store.append(*tokens(start, start + 20), start)
    store.crop(20)
    store.crop(added - added // 2)
    assert said(store.view()) == before


def test_copies_share_pages_and_nothing_else_and_leave_none_behind():
    torch.manual_seed(0)
    mask = torch.rand(BATCH, HEADS, 200) < 0.5
    store = build(mask)
    expected = listed(mask)
    used = store.pool.used
    twin = store.fork()
    assert store.pool.used == used
    store.append(*tokens(200, 240), 200)
    twin.append(*tokens(300, 301), 300)
    assert said(twin.view()) == [[[*held, 300] for held in row] for row in expected]
    assert said(store.view()) == [[held + list(range(200, 240)) for held in row] for row in expected]
    store.release()
    assert said(twin.view()) == [[[*held, 300] for held in row] for row in expected]
    assert twin.pool.used == used
    twin.release()
    assert twin.pool.used == 0


def test_freed_pages_are_used_again():
    pool = PagePool(16, Raw())
    page = torch.zeros(4, 16, 2), torch.zeros(4, 16, 2), torch.zeros(4, 16, dtype=torch.int32), None
    first, second, third = (pool.write(*page) for _ in range(3))
    pool.release(first)
    pool.release(second)
    size = pool.tensors["keys"].shape[0]
    again = [pool.write(*page) for _ in range(2)]
    assert sorted(lease.start for lease in again) == [0, 4]
    assert pool.tensors["keys"].shape[0] == size
    for lease in (*again, third):
        pool.release(lease)
    assert pool.used == 0


def test_rows_move_with_the_batch():
    mask = torch.rand(BATCH, HEADS, 50) < 0.5
    store = build(mask)
    store.rows(lambda held: held.flip(0))
    view = store.view()
    assert (view.keys[0, 0, view.real[0, 0], 0] >= 100_000).all()
    assert torch.equal(store.lengths.long(), mask.sum(-1).flip(0))
