"""What an index backend answers is checked before it is used."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from expbuf_core.answers import checked
from expbuf_core.errors import PluginContractError

VECTORS = np.eye(4, dtype=np.float32)


def right(m: int, k: int) -> tuple[Any, Any]:
    ids = np.tile(np.arange(k), (m, 1))
    return ids, np.tile(-np.arange(k, dtype=np.float32), (m, 1))


def check(answer: Any, m: int, k: int, *, length: float = 1.0, metric: str = "") -> Any:
    queries = np.full((m, 4), length, np.float32)
    return checked(answer, queries, k, "planted", VECTORS, metric)


def changed(answer: tuple[Any, Any], part: int, column: int, value: Any) -> tuple[Any, Any]:
    answer[part][-1, column] = value
    return answer


SHAPES = [(1, 1), (1, 5), (3, 5), (1, 200), (40, 200)]


@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_a_right_answer_is_taken_as_it_is(m: int, k: int) -> None:
    answer = right(m, k)
    ids, similarities = check(answer, m, k)
    assert ids is answer[0]
    assert similarities is answer[1]
    answer[0][:, k // 2 :], answer[1][:, k // 2 :] = -1, -np.inf  # padding comes often
    check(list(answer), m, k)


@pytest.mark.parametrize(("m", "k"), SHAPES)
@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda ids, values: None, "None from"),
        (lambda ids, values: ids, "one array, int64"),
        (lambda ids, values: 7, "a int from"),
        (lambda ids, values: (), "an empty tuple"),
        (lambda ids, values: (ids, values, values), "and float32 .* and float32"),
        (lambda ids, values: (ids.tolist(), values.tolist()), "a list and a list"),
        (lambda ids, values: (ids[:, :-1], values[:, :-1]), "int64 "),
        (lambda ids, values: (np.hstack([ids, ids]), np.hstack([values, values])), "int64 "),
        (lambda ids, values: (ids[0], values[0]), "int64 "),
        (lambda ids, values: (ids.astype(np.float64), values), "float64 "),
        (lambda ids, values: (ids.astype(np.int32), values), "int32 "),
        (lambda ids, values: (ids, values.astype(np.float64)), "float64 "),
    ],
)
def test_another_shape_or_type_is_told(m: int, k: int, spoil: Any, word: str) -> None:
    with pytest.raises(PluginContractError, match=f"'planted' returned .*{word}") as caught:
        check(spoil(*right(m, k)), m, k)
    assert f"expected ids int64 ({m}, {k})" in str(caught.value)


@pytest.mark.parametrize(("m", "k"), SHAPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_similarity_that_is_no_number_is_told(m: int, k: int, bad: float) -> None:
    with pytest.raises(PluginContractError, match=f"'planted' returned the similarity {bad}"):
        check(changed(right(m, k), 1, k // 2, bad), m, k)
    # Of vectors as long as these it may be right.
    check(changed(right(m, k), 1, k // 2, bad), m, k, length=1e20)


@pytest.mark.parametrize(("m", "k"), SHAPES)
@pytest.mark.parametrize(
    ("metric", "bad", "word"), [("l2", 0.5, "above 0"), ("cosine", 7, "above 1")]
)
def test_a_distance_is_told(m: int, k: int, metric: str, bad: float, word: str) -> None:
    """It would put the farthest first."""
    answer = changed(right(m, k), 1, 0, bad)
    with pytest.raises(PluginContractError, match=f"similarity {bad} from .*{metric}.*{word}"):
        check(answer, m, k, metric=metric)
    check(answer, m, k, metric="inner_product")
    rounded = {"l2": 1e-3, "cosine": 1.001}[metric]
    check(changed(right(m, k), 1, 0, rounded), m, k, metric=metric)


@pytest.mark.parametrize(("m", "k"), SHAPES[1:])
@pytest.mark.parametrize("metric", ["cosine", "inner_product", "l2"])
def test_similarities_that_rise_are_told(m: int, k: int, metric: str) -> None:
    """Distances do, where the nearest comes first; who merges results believes in the order."""
    ids, similarities = right(m, k)
    similarities[-1, :] = similarities[-1, ::-1].copy()
    with pytest.raises(PluginContractError, match="similarities that rise"):
        check((ids, similarities), m, k, metric=metric)
    similarities[:] = -1
    check((ids, similarities), m, k, metric=metric)


@pytest.mark.parametrize(("m", "k"), SHAPES[1:])
def test_an_id_that_comes_twice_is_told(m: int, k: int) -> None:
    for padded in (False, True):
        answer = changed(right(m, k), 0, 1, 0)
        if padded:
            answer[0][:, -1], answer[1][:, -1] = -1, -np.inf
        with pytest.raises(PluginContractError, match="'planted' returned an id twice"):
            check(answer, m, k)
