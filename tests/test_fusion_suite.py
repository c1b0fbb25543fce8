"""The contract suite of fusions is a test itself: fusions with one planted bug each fail it."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from expbuf_core.contracts import FusionProvider, NoSettings
from expbuf_core.testing import FusionSuite

Vectors = NDArray[np.float32]


class Sound:
    """No bug, both parts side by side; what the planted ones begin with."""

    version: Any = 1

    def __init__(self, settings: NoSettings) -> None:
        pass

    def output_dim(self, v_dim: int, q_dim: int) -> Any:
        if not v_dim + q_dim:
            raise ValueError("there is nothing to fuse")
        return v_dim + q_dim

    def __call__(self, v: Vectors, q: Vectors) -> Any:
        return np.concatenate([v, q], axis=1)


class TestSound(FusionSuite):
    """A provider may be given as an object, without being installed."""

    provider = FusionProvider("sound", api_version=1, factory=Sound)


class TestOneKindOnly(FusionSuite):
    """Dimensions may be refused."""

    class Equal(Sound):
        def output_dim(self, v_dim: int, q_dim: int) -> Any:
            if v_dim != q_dim or not v_dim:
                raise ValueError("the dimensions differ")
            return 2 * v_dim

    provider = FusionProvider("equal", api_version=1, factory=Equal)


class NumpyDimension(Sound):
    def output_dim(self, v_dim: int, q_dim: int) -> Any:
        return np.int64(super().output_dim(v_dim, q_dim))


class TakesNothing(Sound):
    def output_dim(self, v_dim: int, q_dim: int) -> Any:
        return v_dim + q_dim


class RefusesEverything(Sound):
    def output_dim(self, v_dim: int, q_dim: int) -> Any:
        raise ValueError("no")


class GivesNoReason(Sound):
    def output_dim(self, v_dim: int, q_dim: int) -> Any:
        if v_dim != q_dim:
            raise ValueError
        return super().output_dim(v_dim, q_dim)


class AnotherError(Sound):
    def output_dim(self, v_dim: int, q_dim: int) -> Any:
        if v_dim != q_dim:
            raise KeyError("dimensions")
        return super().output_dim(v_dim, q_dim)


class AnotherDimension(Sound):
    def __call__(self, v: Vectors, q: Vectors) -> Any:
        return super().__call__(v, q)[:, 1:]


class Doubles(Sound):
    def __call__(self, v: Vectors, q: Vectors) -> Any:
        return super().__call__(v, q).astype(np.float64)


class AList(Sound):
    def __call__(self, v: Vectors, q: Vectors) -> Any:
        return super().__call__(v, q).tolist()


class OneRowOnly(Sound):
    def __call__(self, v: Vectors, q: Vectors) -> Any:
        return super().__call__(v[:1], q[:1])


class DividesByZero(Sound):
    def __call__(self, v: Vectors, q: Vectors) -> Any:
        with np.errstate(all="ignore"):
            fused = super().__call__(v, q)
            return fused / np.linalg.norm(fused, axis=1, keepdims=True)


class Overflows(Sound):
    def __call__(self, v: Vectors, q: Vectors) -> Any:
        with np.errstate(all="ignore"):
            return super().__call__(v, q) ** 2


class DrawsAnew(Sound):
    def __init__(self, settings: NoSettings) -> None:
        self.factor = np.random.default_rng().random(dtype=np.float32) + np.float32(1)

    def __call__(self, v: Vectors, q: Vectors) -> Any:
        return super().__call__(v, q) * self.factor


class Learns(Sound):
    mean = np.float32(0)

    def __call__(self, v: Vectors, q: Vectors) -> Any:
        fused = super().__call__(v, q) - self.mean
        if v.size:
            self.mean = v.mean()
        return fused


class CentresTheBatch(Sound):
    def __call__(self, v: Vectors, q: Vectors) -> Any:
        fused = super().__call__(v, q)
        return fused - fused.mean(axis=0) if len(fused) else fused


class KnowsItsProcess(Sound):
    home = os.getpid()

    def __call__(self, v: Vectors, q: Vectors) -> Any:
        return super().__call__(v, q) + np.float32(os.getpid() != self.home)


class Multiplies(Sound):
    """Useful only while both parts are there."""

    def output_dim(self, v_dim: int, q_dim: int) -> Any:
        if v_dim != q_dim or not v_dim:
            raise ValueError("the dimensions differ")
        return v_dim

    def __call__(self, v: Vectors, q: Vectors) -> Any:
        return v * q / np.maximum(1, np.abs(v)) / np.maximum(1, np.abs(q))


class WorksInPlace(Sound):
    def __call__(self, v: Vectors, q: Vectors) -> Any:
        v *= 2
        return super().__call__(v, q)


class HandsBackAView(Sound):
    def __call__(self, v: Vectors, q: Vectors) -> Any:
        return v if not q.shape[1] else super().__call__(v, q)


class Scratch(Sound):
    """Keeps the parts in itself while it works."""

    given: Any = None

    def __call__(self, v: Vectors, q: Vectors) -> Any:
        self.given = v, q
        time.sleep(1e-4)
        return super().__call__(*self.given)


class NoVersion(Sound):
    version = None


class TextVersion(Sound):
    version = "1.2"


class EachItsVersion(Sound):
    made = 0

    def __init__(self, settings: NoSettings) -> None:
        EachItsVersion.made += 1
        self.version = EachItsVersion.made


class NeedsRows(Sound):
    def __call__(self, v: Vectors, q: Vectors) -> Any:
        return super().__call__(v, q) if len(v) else np.stack([])


class ForgetsV(Sound):
    """Everything looks like its neighbour."""

    def __call__(self, v: Vectors, q: Vectors) -> Any:
        return np.ones_like(super().__call__(v, q))


BUGS: list[tuple[type[Sound], str]] = [
    (NumpyDimension, "f1"),
    (TakesNothing, "f1"),
    (RefusesEverything, "f1"),
    (GivesNoReason, "f1"),
    (AnotherError, "f1"),
    (AnotherDimension, "f2"),
    (Doubles, "f2"),
    (AList, "f2"),
    (OneRowOnly, "f2"),
    (DividesByZero, "f2"),
    (Overflows, "f2"),
    (DrawsAnew, "f3"),
    (Learns, "f3"),
    (CentresTheBatch, "f3"),
    (KnowsItsProcess, "f3"),
    (Multiplies, "f4"),
    (WorksInPlace, "f5"),
    (HandsBackAView, "f5"),
    (Scratch, "f6"),
    (NoVersion, "f7"),
    (TextVersion, "f7"),
    (EachItsVersion, "f7"),
    (NeedsRows, "f8"),
    (ForgetsV, "f9"),
]


def suite_for(fusion: type[Sound]) -> FusionSuite:
    class Planted(FusionSuite):
        provider = FusionProvider("planted", api_version=1, factory=fusion)

    return Planted()


def calls(suite: Any, number: str) -> Iterator[Callable[[], None]]:
    """Every parametrized call of the tests with this number."""
    for name in dir(suite):
        if not name.startswith(f"test_{number}_"):
            continue
        test = getattr(suite, name)
        marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        choices = [[(mark.args[0], value) for value in mark.args[1]] for mark in marks]
        for chosen in itertools.product(*choices):
            yield lambda test=test, chosen=chosen: test(**dict(chosen))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("bug", "number"), BUGS, ids=lambda value: getattr(value, "__name__", value)
)
def test_the_suite_finds(bug: type[Sound], number: str) -> None:
    errors = []
    for call in calls(suite_for(bug), number):
        try:
            call()
        except (Exception, pytest.fail.Exception) as exc:
            errors.append(exc)
    assert errors, f"{number} passed although {bug.__name__}"


def test_every_behaviour_has_a_bug() -> None:
    numbers = {name.split("_")[1] for name in dir(FusionSuite) if name.startswith("test_f")}
    assert numbers == {number for _, number in BUGS}
    assert numbers == {f"f{i}" for i in range(1, 10)}
