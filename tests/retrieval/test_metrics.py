"""Metrics against trec_eval's own output and published numbers, by hand, and the comparison of two runs."""

from __future__ import annotations

import json
import math
import os
from itertools import product
from pathlib import Path

import pytest

from lead_ds.data.collections.qrels import write_run
from lead_ds.errors import InputError
from lead_ds.retrieval.evaluate import compare, evaluate_run
from lead_ds.retrieval.metrics import Scores, depth, score_run

SHARED = Path(os.environ.get("LEAD_DS_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data" / "metrics"

# trec_eval's test collection, topics 301-303: whether each of the first 20 results is relevant, the number of relevant
# documents, and what trec_eval prints for ndcg_cut_10, ndcg_cut_20, P_20, recall_20, map_cut_20, recip_rank.
TOPICS = {
    "301": ("00000110000000010101", 474, (0.1518, 0.1985, 0.25, 0.0105, 0.0023, 0.1667)),
    "302": ("11011101101111111110", 77, (0.7530, 0.8082, 0.80, 0.2078, 0.1695, 1.0000)),
    "303": ("00000000000000000010", 10, (0.0000, 0.0509, 0.05, 0.1000, 0.0053, 0.0526)),
}
MEASURES = ("nDCG@10", "nDCG@20", "P@20", "R@20", "AP@20", "RR@20")


def test_trec_eval_by_query() -> None:
    qrels, run = {}, {}
    for topic, (relevant, count, _) in TOPICS.items():
        judged = {f"d{rank}": int(flag) for rank, flag in enumerate(relevant)}
        found = sum(judged.values())
        qrels[topic] = judged | {f"missed{i}": 1 for i in range(count - found)}
        run[topic] = {f"d{rank}": 100.0 - rank for rank in range(20)}
    scores = score_run(run, qrels, MEASURES)
    for topic, (_, _, expected) in TOPICS.items():
        for measure, value in zip(MEASURES, expected, strict=True):
            assert scores.per_query[measure][topic] == pytest.approx(value, abs=6e-5), (topic, measure)
    assert scores.mean["nDCG@10"] == pytest.approx(0.3016, abs=6e-5)


def test_whole_trec_eval_collection() -> None:
    folder = SHARED / "trec_eval"
    if not folder.exists():
        pytest.skip(f"{folder} is absent")
    names = {
        "nDCG@10": "ndcg_cut_10",
        "AP": "map",
        "RR": "recip_rank",
        "R@1000": "recall_1000",
        "R@100": "recall_100",
        "AP@1000": "map_cut_1000",
    }
    scores = evaluate_run(folder / "results.test", folder / "qrels.test", list(names))
    printed = {}
    for line in (folder / "out.test.aq").read_text().splitlines():
        name, topic, value = line.split("\t")
        printed[name.strip(), topic] = value
    for measure, name in names.items():
        assert f"{scores.mean[measure]:.4f}" == printed[name, "all"]
        for topic, value in scores.per_query[measure].items():
            assert f"{value:.4f}" == printed[name, topic]


@pytest.mark.parametrize(("year", "ndcg", "recall"), [(19, 0.5058, 0.4910), (20, 0.4796, 0.5599)])
def test_published_bm25_on_trec_deep_learning(year: int, ndcg: float, recall: float) -> None:
    folder = SHARED / "trec_dl"
    if not folder.exists():
        pytest.skip(f"{folder} is absent")
    files = folder / f"run.bm25.dl{year}.txt", folder / f"qrels.dl{year}-passage.txt"
    mean = evaluate_run(*files, ["nDCG@10", "R@100"], relevance_level=2).mean
    assert mean == {"nDCG@10": pytest.approx(ndcg, abs=1e-4), "R@100": pytest.approx(recall, abs=5e-5)}


def test_graded_judgements_by_hand() -> None:
    qrels = {"q": {"a": 3, "b": 1, "c": 2, "x": 0}}
    run = {"q": {"b": 9.0, "x": 8.0, "a": 7.0}}
    measures = ["nDCG@10", "RR@10", "R@10", "AP@10"]
    dcg, ideal = 1 + 3 / math.log2(4), 3 + 2 / math.log2(3) + 1 / math.log2(4)
    level_1 = score_run(run, qrels, measures).mean
    assert level_1 == pytest.approx({"nDCG@10": dcg / ideal, "RR@10": 1, "R@10": 2 / 3, "AP@10": (1 + 2 / 3) / 3})
    level_2 = score_run(run, qrels, measures, relevance_level=2).mean
    assert level_2 == pytest.approx({"nDCG@10": dcg / ideal, "RR@10": 1 / 3, "R@10": 1 / 2, "AP@10": (1 / 3) / 2})


def test_queries_without_results_count_zero_and_unjudged_queries_do_not_count() -> None:
    qrels = {"q1": {"a": 1}, "q2": {"b": 1}}
    scores = score_run({"q1": {"a": 1.0}, "other": {"a": 1.0}}, qrels, ["RR@10", "nDCG@10"])
    assert scores.mean == {"RR@10": 0.5, "nDCG@10": 0.5}
    assert scores.per_query["RR@10"] == {"q1": 1.0, "q2": 0.0}


def test_names_stay_as_given() -> None:
    scores = score_run({"q": {"a": 1.0}}, {"q": {"a": 1}}, ["MRR@10", "R(rel=2)@5", "nDCG"])
    assert scores.mean == {"MRR@10": 1.0, "R(rel=2)@5": 0.0, "nDCG": 1.0}
    assert depth(["nDCG@10", "R@100"]) == 100
    assert depth(["nDCG@10", "RR"]) == 1000


def test_two_names_of_one_measure() -> None:
    assert score_run({"q": {"a": 1.0}}, {"q": {"a": 1}}, ["MRR@10", "RR@10"]).mean == {"MRR@10": 1.0, "RR@10": 1.0}


@pytest.mark.parametrize(
    ("run", "qrels", "measure", "message"),
    [
        ("q Q0 a 1 1.0 t\n", "q 0 a 1\n", "bogus@10", "measure: 'bogus@10' is unknown"),
        ("q Q0 a 1 1.0 t\n", "q 0 a 1\n", "nDCG@0", "'nDCG@0' reads 0 passages"),
        ("z Q0 a 1 1.0 t\n", "q 0 a 1\n", "RR@10", "run: has no query that is judged"),
        ("q Q0 a 1 nan t\n", "q 0 a 1\n", "RR@10", "not a run line"),
        ("q Q0 a 1 1.0 t\nq Q0 a 2 0.5 t\n", "q 0 a 1\n", "RR@10", "listed twice"),
        ("q Q0 a 1 1.0 t\n", "\n", "RR@10", "holds no judgements"),
        ("", "q 0 a 1\n", "RR@10", "holds no results"),
    ],
)
def test_wrong_input_is_told(tmp_path: Path, run: str, qrels: str, measure: str, message: str) -> None:
    (tmp_path / "run").write_text(run)
    (tmp_path / "qrels").write_text(qrels)
    with pytest.raises(InputError, match=message):
        evaluate_run(tmp_path / "run", tmp_path / "qrels", [measure])


def test_no_measure_is_told() -> None:
    with pytest.raises(InputError, match="measures: none is named"):
        score_run({"q": {"a": 1.0}}, {"q": {"a": 1}}, [])


def test_a_written_run_scores_the_same(tmp_path: Path) -> None:
    run = {"q": {"a": 0.1 + 0.2, "b": 0.3, "c": -1.0}}
    qrels = {"q": {"b": 1}}
    write_run(tmp_path / "run.trec", run)
    assert (
        evaluate_run(tmp_path / "run.trec", qrels).mean
        == score_run(run, qrels, list(evaluate_run(run, qrels).mean)).mean
    )


def scores_of(values: list[float]) -> Scores:
    per_query = {f"q{i}": value for i, value in enumerate(values)}
    return Scores({"m": sum(values) / len(values)}, {"m": per_query})


def test_compare_counts_every_sign_flip() -> None:
    a, b = [0.1, 0.5, 0.3, 0.9], [0.4, 0.6, 0.1, 0.9]
    result = compare(scores_of(a), scores_of(b), "m")
    differences = [y - x for x, y in zip(a, b, strict=True)]
    flips = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in product((1, -1), repeat=4)]
    expected = sum(value >= abs(sum(differences)) - 1e-9 for value in flips) / len(flips)
    assert result.p_value == pytest.approx(expected)
    assert result.difference == pytest.approx(sum(differences) / 4)
    assert "all sign flips" in result.test


def test_compare_samples_many_queries() -> None:
    same = [i / 100 for i in range(100)]
    better = [value + 0.1 * (1 if i % 4 else -1) for i, value in enumerate(same)]
    assert compare(scores_of(same), scores_of(same), "m").p_value == 1.0
    result = compare(scores_of(same), scores_of(better), "m", samples=20_000)
    assert 0 < result.p_value < 0.001
    assert "20000 sign flips" in result.test
    with pytest.raises(InputError, match="different queries"):
        compare(scores_of(same), scores_of(same[:50]), "m")


def test_the_interval_holds_the_difference_and_narrows_with_queries() -> None:
    a = [0.0] * 400
    b = [0.3 if i % 2 else -0.1 for i in range(400)]  # mean 0.1, deviation 0.2
    wide, narrow = compare(scores_of(a[:40]), scores_of(b[:40]), "m"), compare(scores_of(a), scores_of(b), "m")
    for result, queries in ((wide, 40), (narrow, 400)):
        assert result.low < result.difference < result.high
        expected = 2 * 1.96 * 0.2 / queries**0.5  # of the normal distribution that the mean is near
        assert result.high - result.low == pytest.approx(expected, rel=0.1)


def test_compare_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lead_ds.cli.main import main

    lines = [[f"q{i} Q0 {name} {rank} {-rank} t\n" for i in range(8) for rank, name in ranked] for ranked in RANKINGS]
    for name, rows in zip("ab", lines, strict=True):
        (tmp_path / name).write_text("".join(rows))
    (tmp_path / "qrels").write_text("".join(f"q{i} 0 x 1\n" for i in range(8)))
    command = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--qrels", str(tmp_path / "qrels")]
    command += ["--measures", "RR@10 R@100"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0
    header, rank, recall, note = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["A", "B"]
    # Of 2^8 sign flips two are as extreme as eight differences of the same sign.
    assert rank.split() == ["RR@10", "0.5000", "1.0000", "+0.5000", "[+0.5000,", "+0.5000]", f"{2 / 256:.5f}"]
    assert recall.split()[-1] == "1.00000"
    assert note.startswith("8 queries; p: two-sided paired randomisation, all sign flips")
    with pytest.raises(SystemExit):
        main([*command, "--json", "-"])
    found = json.loads(capsys.readouterr().out)["comparisons"]
    assert [(row["measure"], row["queries"]) for row in found] == [("RR@10", 8), ("R@100", 8)]


RANKINGS = [[(1, "y"), (2, "x")], [(1, "x"), (2, "y")]]
