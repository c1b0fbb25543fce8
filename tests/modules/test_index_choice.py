"""Which index a buffer uses, and who is told."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from module_helpers import DIM, OpenBuffer, add_all, experience, find, finds, vector

from expbuf_core import FusionProvider, IndexProvider, IndexSegment, ScorerProvider, hookimpl
from expbuf_core.builtin.exact import ExactIndexBackend, ExactSettings
from expbuf_core.errors import PluginContractError


class Witness:
    """Hears of every fallback."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str, str]] = []

    @hookimpl
    def expbuf_on_fallback(self, kind: str, wanted: str, used: str, reason: str) -> None:
        self.heard.append((kind, wanted, used))


def test_a_fallback_is_told_at_every_opening(open_buffer: OpenBuffer, folder: Path) -> None:
    """Not only where something is built: an operator must not have to wait for that."""
    wanted: dict[str, Any] = {"index": {"backend": "nowhere", "fallback": ["exact"]}}
    for serial in range(2):
        witness = Witness()
        buffer = open_buffer(plugins=[witness], **wanted)
        buffer.add(experience(serial))
        buffer.add(experience(serial + 10))
        assert finds(buffer, serial)
        assert witness.heard == [("index", "nowhere", "exact")]
        buffer.rebuild_index()
        assert len(witness.heard) == 1, "once an opening is enough"
        buffer.close()


def test_no_fallback_no_event(open_buffer: OpenBuffer) -> None:
    witness = Witness()
    buffer = open_buffer(plugins=[witness])
    buffer.add(experience(1))
    buffer.rebuild_index()
    assert witness.heard == []


class Wrong(ExactIndexBackend):
    """A backend that opens something else than a segment, or segments that go wrong."""

    opened: ClassVar[Any] = None

    def open(self, path: Path, ids: Any, vectors: Any) -> Any:
        segment = super().open(path, ids, vectors)
        return self.opened(segment) if callable(self.opened) else self.opened


class Segment(IndexSegment):
    """Wraps a segment that is right."""

    def __init__(self, inner: IndexSegment) -> None:
        self.inner = inner

    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        return self.inner.search(queries, k, allowed)


def plugin(factory: Any) -> Any:
    """A plugin that offers an index backend "wrong"."""

    class Plugin:
        @hookimpl
        def expbuf_register_index_backends(self) -> list[IndexProvider]:
            return [
                IndexProvider(
                    "wrong",
                    api_version=1,
                    factory=factory,
                    settings=ExactSettings,
                    capabilities=frozenset({"filter"}),
                )
            ]

    return Plugin()


def opening(opened_as: Any) -> Any:
    return plugin(type("Wrong", (Wrong,), {"opened": opened_as}))


WRONG: dict[str, Any] = {"index": {"backend": "wrong", "fallback": ["exact"], "builder": "off"}}


def raises(*_: Any) -> Any:
    raise KeyError("device")


@pytest.mark.parametrize("factory", [raises, lambda *_: None, lambda *_: {}])
def test_a_factory_that_fails_in_any_way_gives_way_to_the_fallback(
    open_buffer: OpenBuffer, factory: Any, caplog: pytest.LogCaptureFixture
) -> None:
    witness = Witness()
    buffer = open_buffer(plugins=[witness, plugin(factory)], **WRONG)
    add_all(buffer, range(5))
    assert witness.heard == [("index", "wrong", "exact")]
    assert "index backend 'wrong' is not used" in caplog.text
    buffer.rebuild_index()
    assert finds(buffer, 3)


@pytest.mark.parametrize("opened", [None, 7, raises])
def test_where_no_segment_is_opened_searches_stay_exact(
    open_buffer: OpenBuffer, opened: Any, caplog: pytest.LogCaptureFixture
) -> None:
    buffer = open_buffer(plugins=[opening(opened)], **WRONG)
    add_all(buffer, range(5))
    buffer.rebuild_index()
    assert all(finds(buffer, serial) for serial in range(5))
    assert "the index is not used and will be built again: the index backend 'wrong'" in caplog.text
    assert buffer.stats()["index"]["segments"] == []


def test_a_wrong_answer_of_an_index_names_it(open_buffer: OpenBuffer) -> None:
    class Flat(Segment):
        def search(self, queries: Any, k: int, allowed: Any) -> Any:
            return tuple(part[0] for part in super().search(queries, k, allowed))

    buffer = open_buffer(plugins=[opening(Flat)], **WRONG)
    add_all(buffer, range(5))
    buffer.rebuild_index()
    with pytest.raises(PluginContractError, match="the index backend 'wrong' returned int64"):
        find(buffer, 3)


@pytest.mark.parametrize("tail", [False, True])
def test_results_stay_what_they_are(open_buffer: OpenBuffer, tail: bool) -> None:
    """Though the index uses its arrays again for the next search."""

    class Again(Segment):
        def search(self, queries: Any, k: int, allowed: Any) -> Any:
            found = super().search(queries, k, allowed)
            kept = self.__dict__.setdefault("kept", {}).setdefault(found[0].shape, found)
            kept[0][:], kept[1][:] = found
            return kept

    buffer = open_buffer(plugins=[opening(Again)], **WRONG)
    add_all(buffer, range(20))
    buffer.rebuild_index()
    if tail:
        add_all(buffer, range(20, 22))
    first = find(buffer, 3, k=4)
    many = buffer.search_many(v_embed=vector(3)[None], q_embed=vector(1_000_003)[None], k=4)
    before = [
        first.ids.copy(),
        first.similarities.copy(),
        many.ids.copy(),
        many.similarities.copy(),
    ]
    find(buffer, 9, k=4)
    buffer.search_many(v_embed=vector(9)[None], q_embed=vector(1_000_009)[None], k=4)
    now = [first.ids, first.similarities, many.ids, many.similarities]
    assert all(np.array_equal(a, b) for a, b in zip(before, now, strict=True))


def test_an_index_cannot_write_into_what_it_is_asked(open_buffer: OpenBuffer) -> None:
    refused = []

    class Scribbler(Segment):
        def search(self, queries: Any, k: int, allowed: Any) -> Any:
            for given in (queries, allowed):
                if given is not None:
                    with pytest.raises(ValueError, match="read-only"):
                        given[:] = 0
                    refused.append(given.dtype.name)
            return super().search(queries, k, allowed)

    embedding = {"metric": "inner_product"}
    buffer = open_buffer(plugins=[opening(Scribbler)], embedding=embedding, **WRONG)
    add_all(buffer, range(20))
    buffer.remove([7])
    buffer.rebuild_index()
    buffer.remove([8])
    query = np.ones(DIM, np.float32)
    buffer.search_index(hybrid_embed=query, k=3)
    buffer.search_many(hybrid_embed=query[None], k=3)
    assert refused == ["float32", "uint8"] * 2
    assert (query == 1).all()
    query[:] = 2  # it is still the caller's


def test_distances_are_no_similarities(open_buffer: OpenBuffer) -> None:
    """They put the farthest first."""

    class Distances(Segment):
        def search(self, queries: Any, k: int, allowed: Any) -> Any:
            ids, similarities = super().search(queries, k, allowed)
            return ids[:, ::-1], -similarities[:, ::-1]

    l2: dict[str, Any] = {**WRONG, "embedding": {"metric": "l2"}}
    buffer = open_buffer(plugins=[opening(Distances)], **l2)
    add_all(buffer, range(5))
    assert finds(buffer, 3)
    buffer.rebuild_index()
    with pytest.raises(PluginContractError, match=r"'wrong' returned the similarity .* under l2"):
        find(buffer, 3, k=3)


def planted(fails: list[bool]) -> Any:
    """A scorer and a fusion "mine", which fail on demand."""

    class Fusion:
        version = 1

        def output_dim(self, v_dim: int, q_dim: int) -> int:
            return v_dim

        def __call__(self, v: Any, q: Any) -> Any:
            if fails[0]:
                raise KeyError("fusion")
            return v

    def score(batch: Any) -> Any:
        if fails[0]:
            raise KeyError("scorer")
        return batch.confidence

    class Plugin:
        @hookimpl
        def expbuf_register_priority_scorers(self) -> list[ScorerProvider]:
            return [ScorerProvider("mine", api_version=1, factory=lambda _: score)]

        @hookimpl
        def expbuf_register_embedding_fusions(self) -> list[FusionProvider]:
            return [FusionProvider("mine", api_version=1, factory=lambda _: Fusion())]

    return Plugin()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
def test_an_error_of_a_plugin_says_whose_it_is(open_buffer: OpenBuffer) -> None:
    class Failing(Segment):
        def search(self, queries: Any, k: int, allowed: Any) -> Any:
            raise KeyError("device")

    fails = [False]
    plugins = [planted(fails), opening(Failing)]
    buffer = open_buffer(plugins=plugins, priority="mine", fusion="mine", **WRONG)
    add_all(buffer, range(5))
    buffer.rebuild_index()
    for failing, use, who in (
        (False, lambda: find(buffer, 3), "the index backend 'wrong'"),
        (True, lambda: find(buffer, 3), "the embedding fusion 'mine' (Fusion)"),
        (True, lambda: buffer.add(experience(9)), "the priority scorer 'mine' (function)"),
        (True, lambda: buffer.add_many([experience(8)]), "the priority scorer 'mine' (function)"),
        (True, lambda: buffer.update_rewards([1], [1]), "the priority scorer 'mine' (function)"),
    ):
        fails[0] = failing
        with pytest.raises(KeyError) as caught:
            use()
        assert caught.value.__notes__ == [f"raised by {who}"]
    fails[0] = False
    assert len(buffer) == 5
