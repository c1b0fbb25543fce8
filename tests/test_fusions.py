"""The built-in fusions, against the formulas they state."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from expbuf_core.builtin.fusions import FusionSettings, WeightedConcat, WeightedSum

BOTH = [WeightedSum, WeightedConcat]


def parts(n: int, v_dim: int, q_dim: int, seed: int = 0) -> tuple[NDArray[np.float32], ...]:
    rng = np.random.default_rng(seed)
    v = rng.standard_normal((n, v_dim), dtype=np.float32)
    q = 5 * rng.standard_normal((n, q_dim), dtype=np.float32)
    return v, q


def unit(rows: NDArray[Any]) -> NDArray[np.float64]:
    wide = rows.astype(np.float64)
    result: NDArray[np.float64] = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return result


@pytest.mark.parametrize("n", [1, 2, 33])
def test_weighted_sum_is_the_sum_of_unit_parts(n: int) -> None:
    v, q = parts(n, 12, 12)
    fused = WeightedSum(FusionSettings())(v, q)
    assert fused.dtype == np.float32
    np.testing.assert_allclose(fused, 0.7 * unit(v) + 0.3 * unit(q), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("n", [1, 33])
def test_without_normalisation_it_is_the_bare_sum(n: int) -> None:
    v, q = parts(n, 12, 12)
    settings = FusionSettings(visual_weight=0.6, question_weight=0.9, normalize_parts=False)
    np.testing.assert_allclose(WeightedSum(settings)(v, q), 0.6 * v + 0.9 * q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [1, 33])
@pytest.mark.parametrize("normalize", [True, False])
def test_inner_products_of_concatenations_are_weighted_sums(n: int, normalize: bool) -> None:
    fusion = WeightedConcat(FusionSettings(normalize_parts=normalize))
    (v1, q1), (v2, q2) = parts(n, 7, 31, seed=1), parts(n, 7, 31, seed=2)
    found = (fusion(v1, q1) * fusion(v2, q2)).sum(axis=1)
    if normalize:
        v1, q1, v2, q2 = (unit(part) for part in (v1, q1, v2, q2))  # type: ignore[assignment]
    expected = 0.7 * (v1 * v2).sum(axis=1) + 0.3 * (q1 * q2).sum(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("normalize", [True, False])
def test_one_by_one_is_the_same_as_all_at_once(kind: Any, normalize: bool) -> None:
    fusion = kind(FusionSettings(normalize_parts=normalize))
    v, q = parts(40, 16, 16)
    together = fusion(v, q)
    singly = np.concatenate([fusion(v[i : i + 1], q[i : i + 1]) for i in range(40)])
    np.testing.assert_allclose(together, singly, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", BOTH)
def test_no_rows_are_no_rows(kind: Any) -> None:
    fusion = kind(FusionSettings())
    v, q = parts(0, 6, 6)
    assert fusion(v, q).shape == (0, fusion.output_dim(6, 6))


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("normalize", [True, False])
def test_arguments_stay_as_they_are(kind: Any, normalize: bool) -> None:
    v, q = parts(3, 6, 6)
    before = v.copy(), q.copy()
    fused = kind(FusionSettings(normalize_parts=normalize))(v, q)
    fused += 1
    np.testing.assert_array_equal(v, before[0])
    np.testing.assert_array_equal(q, before[1])


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n", [1, 5])
def test_the_only_part_stands_alone(kind: Any, normalize: bool, n: int) -> None:
    fusion = kind(FusionSettings(visual_weight=0.0, question_weight=0.3, normalize_parts=normalize))
    v, none = parts(n, 9, 0)
    expected = unit(v) if normalize else v
    before = v.copy()
    for fused in (fusion(v, none), fusion(none, v)):
        np.testing.assert_allclose(fused, expected, rtol=1e-5, atol=1e-7)
        fused += 1  # the result is not the argument
    np.testing.assert_array_equal(v, before)
    assert fusion.output_dim(9, 0) == fusion.output_dim(0, 9) == 9


@pytest.mark.parametrize("n", [1, 4])
def test_a_query_that_lacks_a_part_has_zeros_for_it(n: int) -> None:
    v, q = parts(n, 8, 8)
    zeros = np.zeros_like(v)
    summed = WeightedSum(FusionSettings())(zeros, q)
    np.testing.assert_allclose(summed, 0.3 * unit(q), rtol=1e-5, atol=1e-7)
    side = WeightedConcat(FusionSettings())(v, zeros)
    np.testing.assert_allclose(side[:, :8], math.sqrt(0.7) * unit(v), rtol=1e-5, atol=1e-7)
    assert not side[:, 8:].any()


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e20, 1e38])
def test_any_length_within_float32_is_normalised(n: int, scale: float) -> None:
    v, q = parts(n, 8, 8)
    v = np.sign(v) * np.float32(scale)
    fused = WeightedConcat(FusionSettings())(v, q)
    lengths = np.linalg.norm(fused[:, :8], axis=1)
    np.testing.assert_allclose(lengths, math.sqrt(0.7), rtol=1e-5)


def test_zero_rows_among_others_stay_zero() -> None:
    v, q = parts(4, 8, 8)
    v[2] = 0
    fused = WeightedConcat(FusionSettings())(v, q)
    assert not fused[2, :8].any()
    np.testing.assert_allclose(fused[[0, 1, 3], :8], math.sqrt(0.7) * unit(v[[0, 1, 3]]), rtol=1e-5)


def test_output_dimensions() -> None:
    assert WeightedSum(FusionSettings()).output_dim(5, 5) == 5
    assert WeightedConcat(FusionSettings()).output_dim(5, 7) == 12
    with pytest.raises(ValueError, match=r"dimension 5 .* dimension 7; .*weighted_concat"):
        WeightedSum(FusionSettings()).output_dim(5, 7)
    for kind in (WeightedSum, WeightedConcat):
        with pytest.raises(ValueError, match="both dimensions are 0"):
            kind(FusionSettings()).output_dim(0, 0)


@pytest.mark.parametrize(
    "bad",
    [
        {"visual_weight": -0.1},
        {"question_weight": 1.1},
        {"visual_weight": float("nan")},
        {"visual_weight": 0, "question_weight": 0},
        {"weight": 1},
    ],
)
def test_settings_have_bounds(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FusionSettings(**bad)
