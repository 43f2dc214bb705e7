"""Packed rows: every token once, exact borders, labels, order by seed, and losses equal to those of separate documents."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_examples import tiny

from attnkit._core.errors import InputError, OptionError
from attnkit.training.data import IGNORED, PackedRows, pack


def spans_of(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    borders = np.cumsum([0, *lengths])
    return np.arange(borders[-1], dtype=np.uint16), np.stack([borders[:-1], borders[1:]], 1)


def test_pack_marks_borders_positions_and_targets() -> None:
    row = pack([np.array([5, 6, 7]), np.array([8]), np.array([9, 10])])
    assert row["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert row["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, IGNORED, 10]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert row["cu_seq_lens_q"].tolist() == row["cu_seq_lens_k"].tolist() == [0, 3, 4, 6]
    assert row["cu_seq_lens_q"].dtype == torch.int32
    assert (row["max_length_q"], type(row["max_length_q"]), row["max_length_k"]) == (3, int, 3)
    assert "attention_mask" not in row


@pytest.mark.parametrize("sequences", [[], [np.array([1]), np.array([], np.int64)]])
def test_pack_refuses_nothing(sequences: list[np.ndarray]) -> None:
    with pytest.raises(InputError, match="none that is empty"):
        pack(sequences)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    max_length=st.integers(2, 12),
    extra=st.integers(0, 20),
    seed=st.one_of(st.none(), st.integers(0, 99)),
)
def test_a_pass_has_every_token_once_and_no_sequence_crosses_a_document(
    lengths: list[int], max_length: int, extra: int, seed: int | None
) -> None:
    tokens, spans = spans_of(lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    rows = PackedRows(tokens, spans, row_tokens=max_length + extra, max_length=max_length, rows=None, seed=seed)
    seen: Counter[int] = Counter()
    for index in range(len(rows)):
        row = rows[index]
        ids, borders = row["input_ids"][0].numpy(), row["cu_seq_lens_q"].tolist()
        assert len(ids) == rows.row_tokens or index == len(rows) - 1
        for begin, end in itertools.pairwise(borders):
            piece = ids[begin:end]
            assert 1 <= len(piece) <= max_length
            assert (np.diff(piece) == 1).all()
            assert len(set(owner[piece])) == 1
        seen.update(ids.tolist())
        work = rows.work(index)
        sizes = np.diff(borders)
        targets = int((row["labels"] != IGNORED).sum())
        assert (work.tokens, work.targets, work.squares) == (len(ids), targets, int((sizes**2).sum()))
    assert seen == Counter(tokens.tolist())


def test_epochs_follow_without_a_seam_and_in_another_order() -> None:
    tokens, spans = spans_of([5] * 7)  # 35 tokens, rows of 10: epochs do not end where rows do
    rows = PackedRows(tokens, spans, row_tokens=10, max_length=5, rows=21, seed=3)
    stream = torch.cat([rows[index]["input_ids"][0] for index in range(21)]).reshape(6, 35)
    assert all(sorted(epoch.tolist()) == list(range(35)) for epoch in stream)
    assert len({tuple(epoch.tolist()) for epoch in stream}) == 6


def test_rows_are_a_function_of_seed_and_number() -> None:
    tokens, spans = spans_of([9, 4, 30, 2])
    made = [PackedRows(tokens, spans, row_tokens=8, max_length=8, rows=40, seed=seed) for seed in (0, 0, 1)]
    in_order = [made[0][index]["input_ids"].tolist() for index in range(40)]
    backwards = [made[1][index]["input_ids"].tolist() for index in reversed(range(40))][::-1]
    assert in_order == backwards
    assert in_order != [made[2][index]["input_ids"].tolist() for index in range(40)]
    with pytest.raises(IndexError):
        made[0][40]


def test_sizes_that_cannot_be() -> None:
    tokens, spans = spans_of([4])
    with pytest.raises(OptionError, match="a row holds a sequence"):
        PackedRows(tokens, spans, row_tokens=4, max_length=8, rows=1, seed=0)
    with pytest.raises(InputError, match="no tokens"):
        PackedRows(tokens, spans[:0], row_tokens=4, max_length=4, rows=1, seed=0)


def test_a_packed_row_has_the_loss_and_gradient_of_its_documents_alone() -> None:
    model = tiny().double()
    documents = [np.arange(1, 8), np.arange(40, 43), np.array([9]), np.arange(100, 131)]
    row = pack(documents)
    count = int((row["labels"] != IGNORED).sum())
    packed = model(**row, num_items_in_batch=count).loss
    packed.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for ids in documents:
        if len(ids) > 1:
            alone = torch.from_numpy(ids)[None]
            loss = model(input_ids=alone, labels=alone, num_items_in_batch=count).loss
            loss.backward()
            total += loss.detach()
    torch.testing.assert_close(packed.detach().double(), total, rtol=1e-6, atol=0)
    for packed_gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(packed_gradient, parameter.grad, rtol=1e-5, atol=1e-9)


def test_the_same_comparison_fails_without_borders() -> None:
    """The test above can fail: a model that does not know the borders has another loss."""
    model = tiny().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        row = pack([np.arange(1, 20), np.arange(40, 60)])
        with_borders = model(**row).loss
        without = model(input_ids=row["input_ids"], labels=row["labels"]).loss
    assert abs(with_borders - without) > 1e-4
