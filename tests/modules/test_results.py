"""What searches and samples return, and what embeddings may come as."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from module_helpers import (
    DIM,
    OpenBuffer,
    add_all,
    answers,
    columns,
    expected,
    experience,
    find,
    finds,
    vector,
)
from numpy.typing import NDArray

from expbuf_core import (
    ConfigError,
    Experience,
    ExperienceBuffer,
    Hit,
    InvalidExperience,
    NotEnoughExperiences,
)
from expbuf_core.results import Receipt


@pytest.fixture(params=["file", "memory"])
def buffer(request: pytest.FixtureRequest, open_buffer: OpenBuffer) -> ExperienceBuffer:
    """Holds twenty experiences."""
    opener: Any = open_buffer
    made: ExperienceBuffer = (opener if request.param == "file" else opener.memory)(seed=7)
    made.add_many(columns(range(20)))
    return made


def cosine(serial: int, v: NDArray[Any], q: NDArray[Any]) -> float:
    """From the definition: 0.7 and 0.3 of the normalised parts."""

    def fused(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        total = 0.7 * a / np.linalg.norm(a) + 0.3 * b / np.linalg.norm(b)
        return np.asarray(total / np.linalg.norm(total))

    return float(fused(vector(serial), vector(serial + 1_000_000)) @ fused(v, q))


# ---------------------------------------------------------------- search_index


def test_hits_are_the_most_similar_in_falling_order(buffer: ExperienceBuffer) -> None:
    v, q = vector(500), vector(501)
    result = buffer.search_index(v_embed=v, q_embed=q, k=6)
    truth = sorted(((cosine(i, v, q), i) for i in range(20)), reverse=True)[:6]
    assert [hit.experience.answer for hit in result] == [f"answer {i}" for _, i in truth]
    np.testing.assert_allclose(result.similarities, [s for s, _ in truth], atol=1e-5)
    assert result.similarities.dtype == np.float32
    assert result.ids.dtype == np.int64
    assert result.lsn == buffer.lsn
    assert [hit.id for hit in result] == result.ids.tolist()


def test_a_result_is_a_sequence(buffer: ExperienceBuffer) -> None:
    result = find(buffer, 3, k=4)
    assert len(result) == 4
    assert isinstance(result[0], Hit)
    assert result[-1].id == result[3].id
    assert [hit.id for hit in result[1:3]] == result.ids[1:3].tolist()
    for out in (4, -5):
        with pytest.raises(IndexError, match="of 4 hits"):
            result[out]
    assert "Hit(id=" in repr(result)
    assert not find(buffer, 3, exclude=buffer.ids())
    hit = result[0]
    assert (hit.retrieval_count, hit.success_count, hit.success_rate) == (0, 0.0, 0.5)
    assert hit.priority == pytest.approx(0.2)
    assert hit.similarity == pytest.approx(1, abs=1e-5)


def test_k_has_a_default_and_no_upper_bound(buffer: ExperienceBuffer) -> None:
    assert len(find(buffer, 1, k=None)) == 8
    assert len(find(buffer, 1, k=20)) == 20
    for k in (21, 10**6, 10**12):
        assert sorted(find(buffer, 1, k=k).ids) == buffer.ids().tolist()


@pytest.mark.parametrize("indexed", [False, True])
def test_exclude_still_gives_k(buffer: ExperienceBuffer, indexed: bool) -> None:
    if indexed:
        buffer.rebuild_index()
    ids = find(buffer, 3, k=20).ids.tolist()
    assert find(buffer, 3, k=4, exclude=ids[:3]).ids.tolist() == ids[3:7]
    assert find(buffer, 3, k=4, exclude=ids[0]).ids.tolist() == ids[1:5]
    assert find(buffer, 3, k=4, exclude=np.array(ids[::2])).ids.tolist() == ids[1::2][:4]
    assert find(buffer, 3, k=4, exclude={9999, -1}).ids.tolist() == ids[:4]
    assert find(buffer, 3, k=50, exclude=ids[:18]).ids.tolist() == ids[18:]


@pytest.mark.parametrize("indexed", [False, True])
def test_removal_still_gives_k(buffer: ExperienceBuffer, indexed: bool) -> None:
    if indexed:
        buffer.rebuild_index()
    ids = find(buffer, 3, k=20).ids.tolist()
    buffer.remove(ids[:15:2])
    left = [id_ for id_ in ids if id_ not in ids[:15:2]]
    assert find(buffer, 3, k=12).ids.tolist() == left
    assert find(buffer, 3, k=5).ids.tolist() == left[:5]


def test_a_part_of_the_query_may_be_left_out(buffer: ExperienceBuffer) -> None:
    only_v = buffer.search_index(v_embed=vector(4), k=3)
    assert only_v[0].experience.answer == "answer 4"
    only_q = buffer.search_index(q_embed=vector(1_000_005), k=20)
    assert "answer 5" in [hit.experience.answer for hit in only_q]


def test_hybrid_embed_takes_the_place_of_both(buffer: ExperienceBuffer) -> None:
    v, q = vector(4), vector(1_000_004)
    fused = 0.7 * v / np.linalg.norm(v) + 0.3 * q / np.linalg.norm(q)
    for scale in (1.0, 25.0):  # cosine: the length does not matter
        result = buffer.search_index(hybrid_embed=scale * fused, k=3)
        assert result[0].experience.answer == "answer 4"
        assert result[0].similarity == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("metric", ["cosine", "inner_product", "l2"])
@pytest.mark.parametrize("indexed", [False, True])
def test_larger_is_closer_under_every_metric(
    open_buffer: OpenBuffer, metric: str, indexed: bool
) -> None:
    buffer = open_buffer(embedding={"metric": metric})
    for serial in range(15):
        buffer.add(Experience(v_embed=vector(serial), answer=serial))
    if indexed:
        assert buffer.rebuild_index()
    query = vector(99)
    found = buffer.search_index(v_embed=query, k=15)
    assert (np.diff(found.similarities) <= 0).all()
    # One part alone is normalised by the fusion, and that is all.
    fused = np.stack([vector(i) for i in range(15)])
    fused /= np.linalg.norm(fused, axis=1, keepdims=True)
    wanted = query / np.linalg.norm(query)
    truth = {
        "cosine": fused @ wanted,
        "inner_product": fused @ wanted,
        "l2": -((fused - wanted) ** 2).sum(axis=1),
    }[metric]
    np.testing.assert_allclose(found.similarities, np.sort(truth)[::-1], atol=1e-5)
    assert [hit.experience.answer for hit in found] == np.argsort(-truth).tolist()


def test_an_empty_buffer_gives_an_empty_result(open_buffer: OpenBuffer) -> None:
    buffer = open_buffer()
    for _ in range(2):
        result = find(buffer, 1, k=5)
        assert len(result) == 0
        assert result.ids.shape == result.similarities.shape == (0,)
        many = buffer.search_many(v_embed=np.ones((3, DIM)), q_embed=np.ones((3, DIM)), k=4)
        assert (many.ids == -1).all()
        assert many.ids.shape == (3, 4)
        assert np.isneginf(many.similarities).all()
        buffer.add(experience(1))
        buffer.clear()


def test_a_hit_decodes_after_eviction_and_deletion(open_buffer: OpenBuffer) -> None:
    buffer = open_buffer(max_size=5)
    add_all(buffer, range(5))
    result, batch = find(buffer, 2, k=5), buffer.sample(5)
    ids, drawn = result.ids.tolist(), batch.ids.tolist()
    for round_ in range(4):
        buffer.add_many(columns(range(100 * round_, 100 * round_ + 60)))
        buffer.save_snapshot()
    assert buffer.ids()[0] > 100
    serials = [int(hit.experience.answer.split()[1]) for hit in result]
    assert serials[0] == 2
    assert [hit.experience.id for hit in result] == ids
    assert [item.id for item in batch] == drawn
    assert batch.v_embed.shape == (5, DIM)


def test_experiences_of_a_result_are_decoded_once(buffer: ExperienceBuffer) -> None:
    result = find(buffer, 2, k=2)
    first, again = result[0].experience, result.experiences[0]
    assert first.id == again.id
    assert first.v_embed is again.v_embed


# ---------------------------------------------------------------- search_many


def test_search_many_is_the_same_as_one_by_one(buffer: ExperienceBuffer) -> None:
    v = np.stack([vector(200 + i) for i in range(7)])
    q = np.stack([vector(300 + i) for i in range(7)])
    batch = buffer.search_many(v_embed=v, q_embed=q, k=5, exclude=[3])
    assert batch.ids.shape == batch.similarities.shape == (7, 5)
    assert batch.ids.dtype == np.int64
    assert batch.similarities.dtype == np.float32
    for i in range(7):
        one = buffer.search_index(v_embed=v[i], q_embed=q[i], k=5, exclude=[3])
        assert batch.ids[i].tolist() == one.ids.tolist()
        np.testing.assert_allclose(batch.similarities[i], one.similarities, atol=1e-6)
        assert batch.receipts[i].ids == tuple(one.ids.tolist())
    assert len({receipt.token for receipt in batch.receipts}) == 7
    assert buffer.record_outcome(batch.receipts[0], success=True) == 5


def test_search_many_pads(buffer: ExperienceBuffer) -> None:
    batch = buffer.search_many(v_embed=np.ones((2, DIM)), q_embed=np.ones((2, DIM)), k=23)
    assert (batch.ids[:, :20] >= 0).all()
    assert (batch.ids[:, 20:] == -1).all()
    assert np.isneginf(batch.similarities[:, 20:]).all()
    assert len(batch.receipts[0].ids) == 20
    default = buffer.search_many(v_embed=np.ones((2, DIM)), q_embed=np.ones((2, DIM)))
    assert default.ids.shape == (2, 8)


def test_search_many_without_queries(buffer: ExperienceBuffer) -> None:
    none = np.empty((0, DIM))
    for _ in range(2):
        batch = buffer.search_many(v_embed=none, q_embed=none, k=3)
        assert batch.ids.shape == (0, 3)
        assert batch.receipts == []
        buffer.rebuild_index()


# ---------------------------------------------------------------- receipts


def test_a_receipt_survives_being_written_down(buffer: ExperienceBuffer) -> None:
    receipt = find(buffer, 1, k=3).receipt
    text = json.loads(json.dumps(str(receipt)))
    assert Receipt.parse(text) == receipt
    assert receipt.lsn == buffer.lsn
    empty = Receipt.new("00" * 8, 7, ())
    assert Receipt.parse(str(empty)) == empty
    assert len({find(buffer, 1).receipt.token for _ in range(50)}) == 50


# ---------------------------------------------------------------- sample


def test_a_batch_and_its_columns(buffer: ExperienceBuffer) -> None:
    ids = buffer.ids()
    buffer.update_rewards(ids[:10], np.arange(10.0))
    buffer.record_outcome(ids[:5], success=True)
    batch = buffer.sample(32)
    assert len(batch) == 32
    assert batch.lsn == buffer.lsn
    assert batch.ids.dtype == np.int64
    assert batch.is_weights.dtype == np.float32
    assert ((batch.is_weights > 0) & (batch.is_weights <= 1)).all()
    assert batch.is_weights.max() == 1
    assert batch.v_embed.shape == batch.q_embed.shape == (32, DIM)
    for i, item in enumerate(batch):
        assert item.id == batch.ids[i]
        assert item.answer == f"answer {batch.ids[i] - ids[0]}"
        np.testing.assert_array_equal(batch.v_embed[i], item.v_embed)
        np.testing.assert_array_equal(batch.q_embed[i], item.q_embed)
        reward = batch.total_reward[i]
        assert (None if np.isnan(reward) else reward) == item.total_reward
        assert batch.confidence[i] == item.confidence
        assert batch.priority[i] == item.priority
        assert batch.timestamp[i] == item.timestamp
        assert batch.retrieval_count[i] == item.retrieval_count
        assert batch.success_count[i] == item.success_count
    assert "32 experiences" in repr(batch)


def test_the_arrays_of_a_batch_are_its_own(buffer: ExperienceBuffer) -> None:
    batch = buffer.sample(20, replace=False)
    before = batch.priority.copy()
    buffer.update_priorities(buffer.ids(), np.full(20, 9.0))
    np.testing.assert_array_equal(batch.priority, before)
    batch.ids[:] = -1
    batch.priority[:] = -1
    assert buffer.get(int(buffer.ids()[0])).priority == 9.0


def test_ids_that_were_sorted_name_nothing_else(buffer: ExperienceBuffer) -> None:
    """Payloads are read later, and a receipt is made when it is looked at."""
    found, batch = find(buffer, 3, k=6), buffer.sample(30)
    nearest, drawn = found.ids.tolist(), batch.ids.tolist()
    for ids in (found.ids, batch.ids):
        ids[:] = np.sort(ids)[::-1]
        ids[:2] = 0
    assert [hit.experience.id for hit in found] == nearest
    assert found[0].experience.answer == f"answer {nearest[0]}"
    assert found.receipt.ids == tuple(nearest)
    assert [item.id for item in batch] == drawn
    for row, id_ in zip(batch.v_embed, drawn, strict=True):
        assert np.array_equal(row, vector(id_))


def test_draws_follow_the_priorities(buffer: ExperienceBuffer) -> None:
    ids = buffer.ids()
    priorities = np.zeros(20)
    priorities[3], priorities[7] = 1.0, 4.0
    buffer.update_priorities(ids, priorities)
    counts: Counter[int] = Counter()
    for _ in range(40):
        counts.update(buffer.sample(50).ids.tolist())
    weights = (priorities + 1e-3) ** 0.6
    share = weights / weights.sum()
    assert counts[int(ids[7])] / 2000 == pytest.approx(share[7], abs=0.04)
    assert counts[int(ids[3])] / 2000 == pytest.approx(share[3], abs=0.04)
    batch = buffer.sample(64, beta=1.0)
    order = [ids.tolist().index(i) for i in batch.ids]
    np.testing.assert_allclose(batch.probabilities, share[order], rtol=1e-5)
    wanted = (20 * share[order]) ** -1.0
    np.testing.assert_allclose(batch.is_weights, wanted / wanted.max(), rtol=1e-5)


def test_beta_0_turns_the_correction_off(buffer: ExperienceBuffer) -> None:
    assert (buffer.sample(16, beta=0).is_weights == 1).all()
    assert (buffer.sample(16, beta=float(np.float32(0))).is_weights == 1).all()


@pytest.mark.parametrize("uniform", [False, True])
def test_without_replacement_nothing_comes_twice(buffer: ExperienceBuffer, uniform: bool) -> None:
    priorities = np.zeros(20)
    priorities[0] = 1e6
    buffer.update_priorities(buffer.ids(), priorities)
    for n in (1, 7, 20):
        drawn = buffer.sample(n, replace=False, uniform=uniform).ids.tolist()
        assert len(set(drawn)) == n


def test_uniform_has_no_regard_to_priorities(buffer: ExperienceBuffer) -> None:
    ids = buffer.ids()
    priorities = np.zeros(20)
    priorities[0] = 1e9
    buffer.update_priorities(ids, priorities)
    for replace in (True, False):
        counts: Counter[int] = Counter()
        for _ in range(300):
            batch = buffer.sample(5, uniform=True, replace=replace)
            counts.update(batch.ids.tolist())
            np.testing.assert_allclose(batch.probabilities, 0.05)
            assert (batch.is_weights == 1).all()
        assert max(counts.values()) < 130  # 75 each on average
        assert len(counts) == 20


@pytest.mark.parametrize("options", [{}, {"replace": False}, {"uniform": True}, {"beta": 1.0}])
def test_a_seed_decides_the_draws(open_buffer: Any, options: dict[str, Any]) -> None:
    drawn = []
    for make in (open_buffer, open_buffer.memory):
        buffer = make(seed=11)
        buffer.add_many(columns(range(20)))
        first = buffer.sample(10, **options).ids.tolist()
        drawn.append([first, buffer.sample(10, **options).ids.tolist()])
        buffer.close()
    with open_buffer(seed=11) as again:  # loaded, not added: the same
        drawn.append([again.sample(10, **options).ids.tolist() for _ in range(2)])
    assert drawn[0] == drawn[1] == drawn[2]
    assert drawn[0][0] != drawn[0][1]
    with open_buffer(seed=12) as other:
        assert [other.sample(10, **options).ids.tolist() for _ in range(2)] != drawn[0]


def test_a_stream_of_the_callers(buffer: ExperienceBuffer) -> None:
    first = buffer.sample(10, rng=np.random.default_rng(3)).ids.tolist()
    buffer.sample(10)
    assert buffer.sample(10, rng=np.random.default_rng(3)).ids.tolist() == first


def test_the_random_state_can_be_saved(buffer: ExperienceBuffer) -> None:
    state = json.loads(json.dumps(buffer.rng_state()))
    first = buffer.sample(12).ids.tolist()
    buffer.set_rng_state(state)
    assert buffer.sample(12).ids.tolist() == first
    with pytest.raises(ConfigError):
        buffer.set_rng_state({"bit_generator": "os"})


def test_success_is_sampled_more_than_failure(open_buffer: Any) -> None:
    buffer = open_buffer.memory(seed=1)
    ids = buffer.add_many(columns(range(2)))
    for _ in range(200):
        buffer.record_outcome(ids[:1], success=True)
        buffer.record_outcome(ids[1:], success=False)
    counts = Counter(buffer.sample(4000).ids.tolist())
    assert counts[int(ids[0])] / counts[int(ids[1])] == pytest.approx(3, rel=0.15)


# ---------------------------------------------------------------- what embeddings may come as


class Tensor:
    """As much of a torch tensor as the buffer touches."""

    def __init__(self, values: NDArray[Any], dtype: str, *, grad: bool, device: str) -> None:
        self.values = values
        self.dtype = f"torch.{dtype}"
        self.shape = values.shape
        self._grad, self._device = grad, device

    def _like(self, **changes: Any) -> Tensor:
        dtype = changes.pop("dtype", self.dtype.removeprefix("torch."))
        facts = {"grad": self._grad, "device": self._device, **changes}
        return Tensor(self.values, dtype, **facts)

    def __len__(self) -> int:
        return len(self.values)

    def detach(self) -> Tensor:
        return self._like(grad=False)

    def cpu(self) -> Tensor:
        return self._like(device="cpu")

    def float(self) -> Tensor:
        return self._like(dtype="float32")

    def numpy(self) -> NDArray[Any]:
        if self._grad:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad")
        if self._device != "cpu":
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if self.dtype == "torch.bfloat16":
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.values.astype(self.dtype.removeprefix("torch."))


class ArrayLike:
    """Has the array protocol and nothing else."""

    def __init__(self, values: NDArray[Any]) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self.values if dtype is None else self.values.astype(dtype)


def tensor(values: NDArray[Any], dtype: str = "float32", device: str = "cuda:0") -> Tensor:
    return Tensor(values, dtype, grad=True, device=device)


WAYS: dict[str, Any] = {
    "float32": lambda x: x,
    "float64": lambda x: x.astype(np.float64),
    "float16": lambda x: x.astype(np.float16),
    "int": lambda x: np.round(x * 8).astype(np.int16),
    "big-endian": lambda x: x.astype(">f4"),
    "strided": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "reversed": lambda x: x[..., ::-1][..., ::-1],
    "read-only": lambda x: np.frombuffer(x.tobytes(), np.float32).reshape(x.shape),
    "list": lambda x: x.tolist(),
    "tuple": lambda x: tuple(x.tolist()),
    "array protocol": ArrayLike,
    "tensor": tensor,
    "bfloat16 tensor": lambda x: tensor(x, "bfloat16"),
    "half tensor": lambda x: tensor(x, "float16", "cpu"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("first", [False, True])
def test_embeddings_come_in_many_ways(open_buffer: Any, way: str, first: bool) -> None:
    """Also when they are the first, and so decide the dimensions."""
    buffer = open_buffer.memory()
    if not first:
        add_all(buffer, range(10, 20))
    convert = WAYS[way]
    v, q = convert(vector(1)), convert(vector(1_000_001))
    id_ = buffer.add(Experience(v_embed=v, q_embed=q, answer="converted"))
    scale = 8 if way == "int" else 1
    stored = buffer.get(id_).v_embed
    assert stored.dtype == np.float32
    tolerance = {"int": 0.5, "float16": 2e-3, "half tensor": 2e-3}.get(way, 0)
    np.testing.assert_allclose(stored, scale * vector(1), atol=tolerance)
    found = buffer.search_index(v_embed=v, q_embed=q, k=1)
    assert found[0].id == id_
    assert found[0].similarity == pytest.approx(1, abs=1e-5)
    ids = buffer.add_many([Experience(v_embed=v, q_embed=q) for _ in range(3)])
    np.testing.assert_array_equal(buffer.get(int(ids[2])).v_embed, stored)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("first", [False, True])
def test_columns_come_in_many_ways(open_buffer: Any, way: str, first: bool) -> None:
    buffer = open_buffer.memory()
    if not first:
        add_all(buffer, range(10, 20))
    given = columns(range(4))
    given |= {name: WAYS[way](given[name]) for name in ("v_embed", "q_embed")}
    ids = buffer.add_many(given)
    assert answers(buffer)[-4:] == expected(range(4))
    assert np.asarray(buffer.get(int(ids[3])).v_embed).shape == (DIM,)
    many = buffer.search_many(v_embed=given["v_embed"], q_embed=given["q_embed"], k=1)
    assert many.ids[:, 0].tolist() == ids.tolist()


def test_scalars_come_in_many_ways(open_buffer: Any) -> None:
    buffer = open_buffer.memory()
    for value in (0.5, np.float32(0.5), np.float64(0.5), np.array(0.5)):
        id_ = buffer.add(experience(1, confidence=value, rewards=value, timestamp=value))
        found = buffer.get(id_)
        assert (found.confidence, found.total_reward, found.timestamp) == (0.5, 0.5, 0.5)
    assert buffer.get(buffer.add(experience(1, confidence=1))).confidence == 1.0


def test_decoded_embeddings_cannot_be_changed_by_accident(buffer: ExperienceBuffer) -> None:
    item = buffer.get(int(buffer.ids()[3]))
    array = np.asarray(item.v_embed)
    if array.flags.writeable:
        array[:] = 0
    assert finds(buffer, 3)
    np.testing.assert_array_equal(buffer.get(int(buffer.ids()[3])).v_embed, vector(3))


# ---------------------------------------------------------------- conditions


@pytest.mark.parametrize("indexed", [False, True])
def test_where_still_gives_k(buffer: ExperienceBuffer, indexed: bool) -> None:
    ids = buffer.ids()
    buffer.update_rewards(ids[::2], np.arange(10.0))
    if indexed:
        buffer.rebuild_index()
    every = find(buffer, 3, k=20).ids.tolist()
    wanted = [id_ for id_ in every if buffer.get(id_).total_reward]
    result = find(buffer, 3, k=5, where=lambda c: c.reward > 0)
    assert result.ids.tolist() == wanted[:5]
    assert find(buffer, 3, k=50, where=lambda c: c.reward > 0).ids.tolist() == wanted
    left = find(buffer, 3, k=50, where=lambda c: c.reward > 0, exclude=wanted[:2])
    assert left.ids.tolist() == wanted[2:]
    assert len(find(buffer, 3, k=5, where=lambda c: c.reward > 99)) == 0
    one = np.stack([vector(3)]), np.stack([vector(1_000_003)])
    many = buffer.search_many(v_embed=one[0], q_embed=one[1], k=5, where=lambda c: c.reward > 0)
    assert many.ids[0].tolist() == wanted[:5]


def test_sampling_where(buffer: ExperienceBuffer) -> None:
    ids = buffer.ids()
    batch = buffer.sample(50, where=lambda c: c.id >= ids[15])
    assert set(batch.ids.tolist()) == set(ids[15:].tolist())
    np.testing.assert_allclose(batch.probabilities, 0.2)
    with pytest.raises(NotEnoughExperiences):
        buffer.sample(1, where=lambda c: c.id < 0)


def test_sampling_where_without_replacement_and_uniformly(buffer: ExperienceBuffer) -> None:
    ids = buffer.ids().tolist()
    for uniform in (False, True):
        batch = buffer.sample(10, where=lambda c: c.id % 2 == 0, replace=False, uniform=uniform)
        assert sorted(batch.ids.tolist()) == ids[::2]
        with pytest.raises(NotEnoughExperiences, match="match"):
            buffer.sample(11, where=lambda c: c.id % 2 == 0, replace=False, uniform=uniform)
    batch = buffer.sample(64, where=lambda c: c.id < 5, uniform=True)
    assert set(batch.ids.tolist()) == set(ids[:5])
    assert (batch.is_weights == 1).all()


@pytest.mark.parametrize(
    "bad", [7, "reward > 0", lambda c: True, lambda c: c.reward, lambda c: [True]]
)
def test_what_is_no_condition(buffer: ExperienceBuffer, bad: Any) -> None:
    with pytest.raises(InvalidExperience):
        find(buffer, 3, where=bad)
    with pytest.raises(InvalidExperience):
        buffer.sample(2, where=bad)
