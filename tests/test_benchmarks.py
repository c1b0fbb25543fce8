"""The benchmarks: their data and arithmetic, and that docs/benchmarks.md says what they found."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Benchmarks are run from the root of the repository, and belong to no distribution."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT))
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "benchmarks":
            del sys.modules[name]


def row(metric: str, contender: str, better: str, against: float) -> dict[str, Any]:
    return {
        "group": "a group",
        "name": f"a thing: {contender}",
        "unit": "s",
        "values": [3.0, 1.0, 2.0],
        "median": 2.0,
        "ratio": None,
        "against": {"expbuf": against},
        "tags": {"metric": metric, "contender": contender, "better": better},
    }


def results_of(*rows: dict[str, Any]) -> Any:
    from benchmarks.results import Results, _kept

    return Results({"peers": {"rows": [_kept(one) for one in rows]}})


# ---------------------------------------------------------------- the page


def test_the_page_says_what_was_measured() -> None:
    from benchmarks.document import BLOCKS, KEPT, PAGE, filled
    from benchmarks.results import Results

    page = PAGE.read_text(encoding="utf-8")
    for name in BLOCKS:
        assert page.count(f"<!-- figures: {name} -->") == 1
    assert filled(page, Results.read(KEPT)) == page


def test_results_survive_the_file(tmp_path: Path) -> None:
    from benchmarks.results import Results

    results = results_of(row("add.one", "SQLite", "higher", 2.0))
    results.write(tmp_path / "results.json")
    (figure,) = Results.read(tmp_path / "results.json").figures("add.one")
    assert (figure.median, figure.low, figure.high, figure.count) == (2.0, 1.0, 3.0, 3)


def test_publishing_one_suite_keeps_the_others() -> None:
    from benchmarks.results import SUITES, Results

    first, second, third = list(SUITES)[:3]
    kept = Results({third: {"rows": [3]}, first: {"rows": [1]}})
    fresh = Results({first: {"rows": [11]}, second: {"rows": [22]}, third: {"rows": [33]}})
    both = kept.replaced_by(fresh, [first, second, "of which there are no figures"])
    assert list(both.suites.items()) == [
        (first, {"rows": [11]}),
        (second, {"rows": [22]}),
        (third, {"rows": [3]}),  # what lies about of another run is not meant
    ]


@pytest.mark.parametrize(
    ("better", "against", "lost"),
    [("higher", 2.0, "2 ×"), ("higher", 0.5, ""), ("lower", 0.5, "2 ×"), ("lower", 2.0, "")],
)
def test_a_loss_is_told_and_a_win_is_not(better: str, against: float, lost: str) -> None:
    from benchmarks.document import losses

    text = losses(results_of(row("add.one", "SQLite", better, against)))
    assert ("SQLite " + lost in text) if lost else ("SQLite" not in text)


def test_references_that_keep_nothing_are_no_peers() -> None:
    from benchmarks.document import losses

    assert "raw log" not in losses(results_of(row("add.one", "raw log", "higher", 9.0)))


# ---------------------------------------------------------------- the data


def test_nearest_is_exact() -> None:
    from benchmarks.data import nearest

    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((40_000, 8)).astype(np.float32)  # more than one block
    queries = rng.standard_normal((5, 8)).astype(np.float32)
    expected = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(nearest(vectors, queries, 10), expected)


@pytest.mark.parametrize("kind", ["clusters-8", "clusters-128", "photographs", "library text"])
def test_data_are_unit_vectors_alike_in_every_run(kind: str) -> None:
    from benchmarks.data import KINDS

    first, again = KINDS[kind](600, 50, 3), KINDS[kind](600, 50, 3)
    np.testing.assert_array_equal(first.vectors, again.vectors)
    assert first.vectors.dtype == np.float32
    assert first.queries.shape == (50, first.dim)
    np.testing.assert_allclose(np.linalg.norm(first.vectors, axis=1), 1, rtol=1e-5)
    assert not np.isin(first.queries[:, 0], first.vectors[:, 0]).all()


def test_intrinsic_dimension_is_that_of_the_subspace() -> None:
    from benchmarks.data import clusters, intrinsic_dimension

    low = intrinsic_dimension(clusters(4000, 1, 0, intrinsic=4, centres=1).vectors)
    high = intrinsic_dimension(clusters(4000, 1, 0, intrinsic=16, centres=1).vectors)
    assert 2 < low < 5  # length 1 takes one dimension away
    assert 8 < high < 17


# ---------------------------------------------------------------- the harness


def arguments_of(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(
        folder=tmp_path,
        seed=0,
        repetitions=2,
        quick=True,
        json=None,
        peers="",
        peers_python=tmp_path / "none",
    )


def test_a_comparison_over_its_time_makes_no_more_repetitions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from benchmarks import common

    monkeypatch.setattr(common, "_box", 1e-9)
    assert len(common.in_turns({"a": time.perf_counter}, 5)["a"]) == 1
    monkeypatch.setattr(common, "_box", 0)
    assert len(common.in_turns({"a": time.perf_counter}, 5)["a"]) == 5


def test_compare_takes_ratios_turn_by_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.common import Report
    from benchmarks.peers.crew import compare

    report = Report("a title", arguments_of(tmp_path))
    values = {"raw log": [10.0, 20.0], "expbuf": [5.0, 10.0], "SQLite": [10.0, 5.0]}
    compare(report, "add.one", "adds", "adds/s", values, physical="raw log")
    rows = {row.tags["contender"]: row for row in report.rows}
    assert rows["expbuf"].ratio == 0.5
    assert rows["SQLite"].against == {"expbuf": 1.25}
    assert not rows["raw log"].against
    assert "1.25 × expbuf" in capsys.readouterr().out


def test_a_worker_is_driven_killed_and_recovered(tmp_path: Path) -> None:
    from benchmarks.common import Report
    from benchmarks.data import clusters
    from benchmarks.peers.client import lay_out
    from benchmarks.peers.crew import Crew

    report = Report("a title", arguments_of(tmp_path))
    lay_out(tmp_path / "data", clusters(600, 20, 0, dim=16), 500, ["a text", "another"])
    counter = tmp_path / "counter"
    counter.write_bytes(bytes(8))
    names = ["expbuf", "SQLite"]  # the second one has no interpreter here
    with Crew(report, arguments_of(tmp_path), names, tmp_path, capacity=5000) as crew:
        assert list(crew.clients) == ["expbuf"]
        assert crew.once("load", n=500)["expbuf"] > 0
        assert crew.once("recall") == {"expbuf": 1.0}
        found = crew.turns(lambda name, peer: peer("search", seconds=5, most=20))
        assert [result["searches"] for result in found["expbuf"]] == [20, 20]
        client = crew.clients.pop("expbuf")
        client.send("add_until_killed", counter=str(counter))
        while np.fromfile(counter, np.int64)[0] < 20:
            pass
        client.kill()
        client.stop()
        acknowledged = 500 + int(np.fromfile(counter, np.int64)[0])
        crew.start("expbuf")
        assert crew.once("count")["expbuf"] in (acknowledged, acknowledged + 1)
    assert [skip["name"] for skip in report.skipped] == ["SQLite"]
