"""The claim on retrieval: nDCG by hand, texts that are kept apart, losses against another way to have them, the verdict."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from attnkit import assets
from attnkit._core.errors import InputError, OptionError
from attnkit.lab.claims import CLAIMS, pairs
from attnkit.lab.claims.entmax_retrieval import Settings, _config, judge
from attnkit.lab.claims.pairs import MASK, PairRows, Pairs, ndcg, split_pairs
from attnkit.lab.claims.retriever import Retriever, RetrieverForMaskedLM
from attnkit.training import validate

CLAIM = CLAIMS["entmax-retrieval"]


def some(count: int = 6) -> Pairs:
    draw = np.random.default_rng(0)
    queries, documents = (
        tuple(draw.integers(65, 91, int(size), dtype=np.uint8) for size in draw.integers(*sizes, count))
        for sizes in ((2, 9), (10, 40))
    )
    return Pairs(queries, documents)


def small(kind: Any, alpha: float = 1.5) -> Any:
    torch.manual_seed(0)
    model = kind(_config(Settings(dim=32, layers=1, heads=2), alpha)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8)  # so that bytes matter, which weights of 0.02 hide
    return model


def test_ndcg_by_hand() -> None:
    """Ranks of the first query are documents 2, 0, 3, 1 with gains 3, 0, 1, 2; the best order of gains is 3, 2, 1."""
    scores = torch.tensor([[0.5, 0.1, 0.9, 0.3], [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]])
    relevance = torch.tensor([[0, 2, 3, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    best = 3 + 2 / math.log2(3) + 1 / 2
    found = ndcg(scores, relevance)
    assert found.tolist() == pytest.approx([(3 + 1 / 2 + 2 / math.log2(5)) / best, 1 / math.log2(5), 0])
    assert ndcg(scores, relevance, at=3).tolist() == pytest.approx([(3 + 1 / 2) / best, 0, 0])
    assert ndcg(scores, relevance)[0].item() == pytest.approx(0.9159, abs=1e-4)


def test_only_ten_ranks_count() -> None:
    scores = -torch.arange(12.0).repeat(12, 1)
    expected = [1 / math.log2(rank + 1) if rank <= 10 else 0 for rank in range(1, 13)]
    assert ndcg(scores, torch.eye(12)).tolist() == pytest.approx(expected)


def test_no_judged_title_was_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [assets.Document(f"{i}", f"Title {i % 40}\n\nabstract {i % 90} and so on") for i in range(100)]
    texts += [
        assets.Document("short", "Short\n\nno"),
        assets.Document("alone", "A title alone"),
        assets.Document("twin", "Another title\n\nabstract 3 and so on"),
        assets.Document("x", "TITLE  7\n\nother text, long"),
    ]
    monkeypatch.setattr(pairs, "documents", lambda source: texts)
    trained, held = split_pairs("any", judged=10, least=10)
    assert (len(trained.queries), len(held.queries)) == (30, 10)

    def names(side: Pairs) -> set[str]:
        return {" ".join(query.tobytes().decode().casefold().split()) for query in side.queries}

    assert len(names(trained) | names(held)) == 40, "each title once"
    assert not {text.tobytes() for text in trained.documents} & {text.tobytes() for text in held.documents}
    by_query = {text.text.partition("\n\n")[0]: set[str]() for text in texts}
    for text in texts:
        by_query[text.text.partition("\n\n")[0]].add(text.text.partition("\n\n")[2])
    for query, document in zip(held.queries, held.documents, strict=True):
        assert document.tobytes().decode() in by_query[query.tobytes().decode()]
    texts.reverse()
    assert names(split_pairs("any", judged=10, least=10)[1]) == names(held), "the order of the source does not matter"
    with pytest.raises(InputError, match="has 40 pairs"):
        split_pairs("any", judged=40, least=10)


def test_rows_are_queries_then_their_documents() -> None:
    given = some()
    rows = PairRows(given, count=4, length=12, rows=3, seed=1)
    row = rows[2]
    starts, ids, labels = row["cu_seq_lens_q"].tolist(), row["input_ids"][0].numpy(), row["labels"][0].tolist()
    parts = [ids[begin:end].tobytes() for begin, end in itertools.pairwise(starts)]
    numbers = [next(i for i, q in enumerate(given.queries) if q.astype(np.int64).tobytes() == part) for part in parts[:4]]
    assert len(set(numbers)) == 4
    assert parts[4:] == [given.documents[number][:12].astype(np.int64).tobytes() for number in numbers]
    assert [(place, label) for place, label in enumerate(labels) if label != -100] == [(starts[i + 1] - 1, i) for i in range(4)]
    work = rows.work(2)
    lengths = np.diff(starts)
    assert (work.tokens, work.targets, work.squares) == (len(ids), 4, int((lengths**2).sum()))
    assert np.array_equal(rows[2]["input_ids"], row["input_ids"]), "a row is a function of its number"
    assert not np.array_equal(rows[1]["input_ids"], row["input_ids"])
    whole = PairRows(given, count=4, length=12, rows=None)
    assert [len(whole[i]["cu_seq_lens_q"]) - 1 for i in range(len(whole))] == [8, 4]
    for count in (1, 7):
        with pytest.raises(OptionError, match="2 to 6"):
            PairRows(given, count=count, length=12, rows=1)


def test_hidden_bytes_are_their_own_labels() -> None:
    given = some(60)
    plain, masked = (PairRows(given, count=50, length=40, rows=1, masked=masked)[0] for masked in (False, True))
    hidden = masked["labels"] != -100
    assert torch.equal(masked["labels"][hidden], plain["input_ids"][hidden])
    assert bool((masked["input_ids"][hidden] == MASK).all())
    assert torch.equal(masked["input_ids"][~hidden], plain["input_ids"][~hidden])
    assert 0.1 < float(hidden.float().mean()) < 0.2


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_packed_vectors_are_those_of_texts_alone(alpha: float) -> None:
    model, row = small(Retriever, alpha), PairRows(some(), count=4, length=12, rows=1)[0]
    labels = row.pop("labels")
    with torch.no_grad():
        found = model.embed(**row)
        loss = model(**row, labels=labels).loss
        alone = []
        for begin, end in zip(row["cu_seq_lens_q"], row["cu_seq_lens_q"][1:], strict=False):
            mean = model.model(input_ids=row["input_ids"][:, begin:end]).last_hidden_state[0].mean(0)
            alone.append(mean / mean.norm())
    assert torch.allclose(found, torch.stack(alone), atol=1e-5)
    cosines = 20 * torch.stack(alone[:4]) @ torch.stack(alone[4:]).T
    assert loss.item() == pytest.approx((cosines.logsumexp(1) - cosines.diagonal()).mean().item(), rel=1e-4)


@pytest.mark.parametrize("kind", [Retriever, RetrieverForMaskedLM])
def test_validation_sees_what_is_trained(kind: Any) -> None:
    model, rows = small(kind), PairRows(some(), count=6, length=40, rows=1, masked=kind is RetrieverForMaskedLM)
    with torch.no_grad():
        trained = model(**rows[0]).loss.item()
    assert validate(model, rows).loss == pytest.approx(trained, rel=1e-4)
    if kind is RetrieverForMaskedLM:
        row = rows[0]
        labels = row.pop("labels")[0]
        logits = model.lm_head(model.model(**row).last_hidden_state)[0]
        assert F.cross_entropy(logits, labels).item() == pytest.approx(trained, rel=1e-4), "token t predicts label t"


def test_all_documents_are_ranked() -> None:
    """Not only those of a query's own row."""
    model, given = small(Retriever), some(6)
    one, three = (judge(model, PairRows(given, count=count, length=40, rows=None), "fp32") for count in (6, 2))
    assert torch.allclose(one, three)
    same = Pairs(given.documents, given.documents)
    assert judge(model, PairRows(same, count=4, length=40, rows=None), "fp32").tolist() == [1.0] * 6


def retrieval(gains: dict[int, list[float]], level: float = 0.5) -> Any:
    settings = CLAIM.configure(seeds=(0, 1), changes={"lengths": ",".join(map(str, gains))})
    rows = [
        {
            "length": length, "seed": seed, "alpha": alpha, "ndcg": level + (gain if alpha == 1.5 else 0), "found_first": 0.25,
            "step_ms": 1.0,
        }
        for length, of in gains.items()
        for seed, gain in enumerate(of)
        for alpha in (1.0, 1.5)
    ]  # fmt: skip
    return CLAIM.conclude(settings, rows)


def test_the_verdict() -> None:
    assert retrieval({64: [0.1, 0.1], 128: [0.1, 0.2]}).verdict.outcome == "holds"
    assert retrieval({64: [-0.1, 0.3], 128: [0.1, 0.2]}).verdict.outcome == "holds in part"
    assert retrieval({64: [-0.1, 0.1], 128: [0.3, -0.1]}).verdict.outcome == "undecided"
    assert retrieval({64: [-0.1, 0.0], 128: [-0.1, -0.2]}).verdict.outcome == "does not hold"
    assert retrieval({64: [0.1, 0.1], 128: [0.3]}).verdict.outcome == "undecided", "a seed is missing"
    assert retrieval({64: [0.01, 0.01], 128: [0.01, 0.01]}, level=0.05).verdict.outcome == "undecided", "nothing was learnt"
    found = retrieval({64: [0.1, 0.2]})
    assert found.verdict.numbers == {"gain at 64": pytest.approx(0.15)}
    assert found.tables[0]["rows"][1] == ["64", "1.5", "0.650 (0.600 to 0.700)", 0.25, 1.0]
