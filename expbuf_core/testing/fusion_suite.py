"""The contract of `EmbeddingFusion` as tests; a plugin's test file is a subclass.

    from expbuf_core.testing import FusionSuite

    class TestMyFusion(FusionSuite):
        provider = "my_fusion"

Every behaviour has a number, which stays for ever (`docs/plugins.md`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from expbuf_core.buffer import ExperienceBuffer
from expbuf_core.contracts import EmbeddingFusion, FusionProvider
from expbuf_core.experience import Experience
from expbuf_core.testing.processes import in_threads
from expbuf_core.testing.suite import Suite

Vectors = NDArray[np.float32]


class FusionSuite(Suite):
    """What every fusion of two embeddings must do.

    Attributes:
        provider: The fusion's name, or its `FusionProvider`.
        settings: Its section of the configuration.
        dims: Dimensions (visual, question) to try. It may refuse some of them, not all.
    """

    kind = "fusion"
    provider: ClassVar[str | FusionProvider] = ""
    dims: ClassVar[Sequence[tuple[int, int]]] = ((16, 16), (16, 24), (7, 3), (16, 0), (0, 16))

    def test_f1_says_its_dimension(self) -> None:
        """F1: the dimension of the result is an int of at least 1, the same each time."""
        for v_dim, q_dim, dim in self.accepted():
            assert type(dim) is int, f"{dim!r} is no int"
            assert dim >= 1, f"dimension {dim} of ({v_dim}, {q_dim})"
            assert self.fusion().output_dim(v_dim, q_dim) == dim, "two dimensions"

    def test_f1_refuses_with_a_reason(self) -> None:
        """F1: what cannot be fused, no part at all among it, is a ValueError that says why."""
        fusion = self.fusion()
        with pytest.raises(ValueError, match=r"\S"):
            fusion.output_dim(0, 0)
        for v_dim, q_dim in self.dims:
            try:
                fusion.output_dim(v_dim, q_dim)
            except ValueError as exc:
                reason = str(exc).strip()
            else:
                reason = "not needed"
            assert reason, f"({v_dim}, {q_dim}) is refused without a reason"

    @pytest.mark.parametrize("n", [1, 2, 33, 500])
    def test_f2_shape_and_type(self, n: int) -> None:
        """F2: (n, output_dim) float32, also where a part has dimension 0."""
        for v_dim, q_dim, _ in self.accepted():
            self.fused(*parts(n, v_dim, q_dim))

    @pytest.mark.parametrize("length", [0.0, 1e-30, 1e-12, 1e12, 1e25])
    def test_f2_finite(self, length: float) -> None:
        """F2: finite for finite parts: zeros, tiny ones, large ones, one of each kind."""
        for v_dim, q_dim, _ in self.accepted():
            v, q = parts(5, v_dim, q_dim)
            factor = np.float32(length)
            for scaled in ((v * factor, q), (v, q * factor), (v * factor, q * factor)):
                self.fused(*scaled)
                self.fused(scaled[0][:1], scaled[1][:1])

    def test_f3_the_same_again(self) -> None:
        """F3: the same result again, and from another fusion with the same settings."""
        fusion = self.fusion()
        for v_dim, q_dim, _ in self.accepted():
            v, q = parts(20, v_dim, q_dim)
            first = self.fused(v, q, fusion)
            self.fused(*parts(3, v_dim, q_dim, seed=5), fusion)
            assert np.array_equal(first, self.fused(v, q, fusion)), "another result the next time"
            assert np.array_equal(first, self.fused(v, q)), "another fusion gives another result"

    def test_f3_batch_equals_singles(self) -> None:
        """F3: a batch gives what its rows give one by one, up to rounding."""
        for v_dim, q_dim, _ in self.accepted():
            v, q = parts(40, v_dim, q_dim)
            together = self.fused(v, q)
            for i in range(len(v)):
                alone = self.fused(v[i : i + 1], q[i : i + 1])[0]
                assert np.allclose(together[i], alone, rtol=1e-4, atol=1e-5), (
                    f"row {i} of a batch differs from the same row alone"
                )

    def test_f3_the_same_in_another_process(self, tmp_path: Path) -> None:
        """F3: another process gets the same; nothing depends on its random or hash seed."""
        for i, (v, q, _) in enumerate(self.accepted()):
            np.save(tmp_path / f"{i}.npy", self.fused(*parts(20, v, q)))
        self.elsewhere("fuses_the_same", str(tmp_path))

    def fuses_the_same(self, folder: str) -> None:
        """In another process, see F3: compare with what is stored in the folder."""
        np.random.seed(17)  # noqa: NPY002  (a fork would have the parent's)
        for i, (v, q, _) in enumerate(self.accepted()):
            wanted = np.load(Path(folder) / f"{i}.npy")
            assert np.array_equal(self.fused(*parts(20, v, q)), wanted), "another result"

    def test_f4_a_query_without_one_part(self) -> None:
        """F4: with zeros for one part the result still tells the other part's values apart."""
        for v_dim, q_dim, _ in self.accepted():
            if not (v_dim and q_dim):
                continue
            v, q = parts(8, v_dim, q_dim)
            for alone in (self.fused(v, 0 * q), self.fused(0 * v, q)):
                spread = np.abs(alone - alone[0]).max(axis=1)[1:]
                assert (spread > 0).all(), "with one part alone, different queries look the same"

    def test_f5_arguments_stay_as_they_are(self) -> None:
        """F5: its arguments are not changed, need not be writable, and are not handed back."""
        fusion = self.fusion()
        for v_dim, q_dim, _ in self.accepted():
            for n in (1, 20):
                v, q = parts(n, v_dim, q_dim)
                before = v.copy(), q.copy()
                fused = self.fused(v, q, fusion)
                assert np.array_equal(v, before[0]), "v was changed"
                assert np.array_equal(q, before[1]), "q was changed"
                fused[:] = 7
                assert np.array_equal(v, before[0]), "the result is a view of v"
                assert np.array_equal(q, before[1]), "the result is a view of q"
                v.flags.writeable = q.flags.writeable = False
                self.fused(v, q, fusion)

    def test_f6_threads(self) -> None:
        """F6: several threads use one fusion at once, and get what one gets."""
        fusion = self.fusion()
        v_dim, q_dim, _ = self.accepted()[0]
        given = [parts(n, v_dim, q_dim, seed=n) for n in (1, 2, 7, 300)]
        expected = [self.fused(v, q) for v, q in given]

        def work(first: int) -> None:
            for turn in range(80):
                which = (first + turn) % len(given)
                assert np.array_equal(fusion(*given[which]), expected[which]), (
                    f"a thread got something else for {len(given[which][0])} rows"
                )

        in_threads(work)

    def test_f7_has_a_version(self) -> None:
        """F7: `version` is an int that all fusions of these settings share."""
        version = self.fusion().version
        assert type(version) is int, f"version {version!r} is no int"
        assert self.fusion().version == version, "two versions"

    def test_f8_no_rows(self) -> None:
        """F8: no rows give a result of no rows."""
        for v_dim, q_dim, _ in self.accepted():
            self.fused(*parts(0, v_dim, q_dim))

    def test_f9_in_a_buffer(self) -> None:
        """F9, F2: in a buffer under cosine every experience finds itself, at similarity 1."""
        for v_dim, q_dim, _ in self.accepted():
            v, q = parts(30, v_dim, q_dim)
            given: list[dict[str, Any]] = [
                {"v_embed": x if v_dim else None, "q_embed": y if q_dim else None}
                for x, y in zip(v, q, strict=True)
            ]
            with self.buffer() as buffer:
                ids = buffer.add_many([Experience(**one) for one in given])
                for id_, one in zip(ids, given, strict=True):
                    (hit,) = buffer.search_index(**one, k=1)
                    assert hit.id == id_, "an experience does not find itself"
                    assert abs(hit.similarity - 1) < 1e-4, f"similarity {hit.similarity} to itself"

    # ------------------------------------------------------------ help

    def fusion(self) -> EmbeddingFusion:
        """Make the fusion under test."""
        return cast(EmbeddingFusion, self.make())

    def accepted(self) -> list[tuple[int, int, int]]:
        """Those of `dims` that it takes, with the dimension of the result."""
        found = list(self._accepted())
        assert found, f"it refuses all of {list(self.dims)}; name some that it takes in `dims`"
        return found

    def _accepted(self) -> Iterator[tuple[int, int, int]]:
        fusion = self.fusion()
        for v_dim, q_dim in self.dims:
            try:
                dim = fusion.output_dim(v_dim, q_dim)
            except ValueError:
                continue
            yield v_dim, q_dim, dim

    def fused(self, v: Vectors, q: Vectors, fusion: EmbeddingFusion | None = None) -> Vectors:
        """What a fusion (None: made anew) says, checked (F2)."""
        fusion = fusion or self.fusion()
        wanted = len(v), fusion.output_dim(v.shape[1], q.shape[1])
        found = fusion(v, q)
        assert isinstance(found, np.ndarray), f"a {type(found).__name__} is no array"
        assert found.shape == wanted, f"shape {found.shape}, wanted {wanted}"
        assert found.dtype == np.float32, f"the result is {found.dtype}"
        assert np.isfinite(found).all(), "not finite although the parts are"
        return found

    def buffer(self) -> ExperienceBuffer:
        """A buffer in memory that fuses by it, under cosine."""
        return ExperienceBuffer.open(
            plugins=self.plugins(),
            fusion=self.choice(),
            embedding={"metric": "cosine"},
            index="exact",
        )


def parts(n: int, v_dim: int, q_dim: int, seed: int = 0) -> tuple[Vectors, Vectors]:
    """(n, v_dim) and (n, q_dim) random embeddings, of other lengths."""
    draw = np.random.default_rng((seed, n))
    v = draw.standard_normal((n, v_dim), dtype=np.float32)
    q = 3 * draw.standard_normal((n, q_dim), dtype=np.float32)
    return v, q
