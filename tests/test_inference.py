import logging
import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expbuf_core.errors import (
    BufferClosed,
    ConfigError,
    CorruptionError,
    DimensionError,
    InvalidExperience,
    UnknownExperienceError,
)
from expbuf_core.experience import Experience
from expbuf_core.inference import TemporalEnsemble, same_answer

NOW = 1_800_000_000.0
EAST, NORTH = np.array([1.0, 0.0], np.float32), np.array([0.0, 1.0], np.float32)


def between(cosine):
    """A direction of this cosine to EAST."""
    return np.array([cosine, math.sqrt(1 - cosine * cosine)], np.float32)


class Memory:
    """The methods that the ensemble uses, on a list; notes every write in order."""

    def __init__(self, **inference):
        self.experiences = []
        self.writes = []
        self.applied = set()
        self.fail = None
        self.receipts = 0
        settings = SimpleNamespace(
            k=8, min_experiences=1, confident=0.6, model_weight=1.0, similarity_power=4.0,
            half_life_s=None,
        )  # fmt: skip
        vars(settings).update(inference)
        self.config = SimpleNamespace(
            inference=settings, embedding=SimpleNamespace(metric="cosine")
        )

    def __len__(self):
        return len(self.experiences)

    def add(self, experience, *, priority=None):
        if np.shape(experience.v_embed) != (2,):
            raise DimensionError(f"expected 2 dimensions, found {np.shape(experience.v_embed)}")
        self.experiences.append(replace(experience, id=len(self.experiences)))
        self.writes.append(("add", len(self.experiences) - 1))
        return len(self.experiences) - 1

    def search_index(self, *, v_embed=None, q_embed=None, k=None):
        if self.fail:
            raise self.fail
        if np.shape(v_embed) != (2,):
            raise DimensionError(f"expected 2 dimensions, found {np.shape(v_embed)}")
        self.receipts += 1
        hits = [
            Hit(e, float(np.dot(e.v_embed, v_embed)), self)
            for e in self.experiences
        ]  # fmt: skip
        hits = sorted(hits, key=lambda hit: -hit.similarity)[:k]
        return SearchResult(hits, f"receipt-{self.receipts}")

    def record_outcome(self, receipt_or_ids, *, success, credit=None):
        self.writes.append(("outcome", receipt_or_ids, success, credit))
        if receipt_or_ids in self.applied:
            return 0
        self.applied.add(receipt_or_ids)
        return 1

    def update_rewards(self, ids, rewards):
        self.writes.append(("reward", *ids, *rewards))
        for id, reward in zip(ids, rewards, strict=True):
            self.experiences[id] = replace(self.experiences[id], rewards=reward)
        return len(ids)


class SearchResult(list):
    def __init__(self, hits, receipt):
        super().__init__(hits)
        self.receipt = receipt


class Hit:
    def __init__(self, experience, similarity, memory):
        self.id, self.similarity = experience.id, similarity
        self.success_rate = (experience.success_count + 1) / (experience.retrieval_count + 2)
        self._experience, self._memory = experience, memory

    @property
    def experience(self):
        if isinstance(self._experience.metadata, dict) and "damaged" in self._experience.metadata:
            raise CorruptionError("checksum mismatch", path="log", offset=5)
        return self._experience


def remember(memory, answer, *, v=EAST, rewards=None, age_s=0.0, **fields):
    return memory.add(
        Experience(v_embed=v, answer=answer, rewards=rewards, timestamp=NOW - age_s, **fields)
    )


def make(memory, **options):
    return TemporalEnsemble(memory, **{"clock": lambda: NOW, **options})


def ask(ensemble, prediction="model", confidence=0.2, *, v=EAST, **options):
    return ensemble.answer(
        v, None, question="which?", prediction=prediction, confidence=confidence, **options
    )


# ---------------------------------------------------------------- cold start


def test_below_the_cold_start_size_it_only_stores():
    memory = Memory(min_experiences=3)
    ensemble = make(memory)
    for n in range(3):
        consensus = ask(ensemble, "yes", 0.3)
        assert (consensus.answer, consensus.confidence) == ("yes", 0.3)
        assert not consensus.used_memory
        assert consensus.receipt is None
        assert consensus.warning is None
        assert consensus.experience_id == n
    assert memory.writes == [("add", 0), ("add", 1), ("add", 2)]
    assert ask(ensemble, "yes", 0.3).used_memory


def test_an_empty_buffer_is_not_asked():
    memory = Memory(min_experiences=0)
    memory.fail = AssertionError("searched")
    assert ask(make(memory), store=False).answer == "model"
    assert memory.writes == []


# ---------------------------------------------------------------- votes


def test_votes_by_the_formula():
    memory = Memory(similarity_power=2.0, half_life_s=100.0)
    remember(memory, "a", v=between(0.9), confidence=0.5)  # 0.9^2 * 0.5 * 0.5
    remember(
        memory, "a", v=between(0.8), confidence=1.0, age_s=100, retrieval_count=6, success_count=5
    )  # 0.8^2 * 0.75 / 2
    remember(memory, "b", v=between(0.7), rewards=1.0, confidence=0.1)  # 0.7^2
    remember(memory, "c", v=between(0.6), rewards={"right": -1.0})  # -0.5 * 0.6^2
    consensus = ask(make(memory), "c", 0.4, store=False)
    votes = {vote.answer: vote for vote in consensus.votes}
    a, b, c = 0.81 * 0.25 + 0.64 * 0.375, 0.49, 0.4 - 0.18
    assert votes["a"].weight == pytest.approx(a, rel=1e-6)
    assert votes["b"].weight == pytest.approx(b, rel=1e-6)
    assert votes["c"].weight == pytest.approx(c, rel=1e-6)
    assert votes["c"].model == pytest.approx(0.4)
    assert [vote.answer for vote in consensus.votes] == ["b", "a", "c"]
    assert votes["a"].ids == (0, 1)
    assert votes["c"].against == (3,)
    assert consensus.neighbours == (0, 1, 2, 3)
    assert consensus.answer == "b"
    assert consensus.confidence == pytest.approx(b / (a + b + c + 0.18 + 0.6), rel=1e-6)
    assert consensus.credit == (0.0, 0.0, 1.0, 1.0)


def test_agreement_raises_confidence_and_dissent_lowers_it():
    alone = ask(make(Memory()), "yes", 0.5, store=False)
    memory = Memory()
    remember(memory, "yes", rewards=1.0)
    agreed = ask(make(memory), "yes", 0.5, store=False)
    remember(memory, "no", rewards=1.0)
    contested = ask(make(memory), "yes", 0.5, store=False)
    assert alone.confidence == 0.5
    assert agreed.confidence == pytest.approx(0.75)
    assert contested.confidence == pytest.approx(0.5)
    assert contested.answer == "yes"


def test_known_errors_speak_against_their_answer():
    memory = Memory()
    for _ in range(3):
        remember(memory, "3", rewards=0.0)
    consensus = ask(make(memory), "3", 0.9, store=False)
    assert (consensus.answer, consensus.confidence) == ("3", 0.0)  # nothing else is known
    assert consensus.votes[0].weight == pytest.approx(0.9 - 1.5)
    remember(memory, "8", confidence=0.5)
    assert ask(make(memory), "3", 0.9, store=False).answer == "8"
    # Left out where they are given no weight: then they do not take part.
    quiet = ask(make(memory, wrong_weight=0.0, k=3), "3", 0.9, store=False)
    assert (quiet.answer, quiet.confidence, quiet.used_memory) == ("3", 0.9, False)


def test_the_next_best_answer_wins_when_the_best_is_a_known_error():
    memory = Memory()
    remember(memory, "3", rewards=-1.0)
    remember(memory, "3", rewards=-1.0)
    probabilities = {"3": 0.6, "8": 0.3, "9": 0.1}
    consensus = ask(make(memory), "3", 0.6, probabilities=probabilities)
    assert consensus.answer == "8"
    assert consensus.confidence == pytest.approx(0.3 / (0.3 + 0.1 + 0.6))
    assert consensus.credit == (1.0, 1.0)
    np.testing.assert_allclose(memory.experiences[-1].probabilities, [0.6, 0.3, 0.1], rtol=1e-6)
    # Too much probability is scaled down, too little is doubt.
    generous = ask(make(Memory()), "3", 0.6, probabilities={"3": 6.0, "8": 3.0, "9": 1.0})
    assert [vote.weight for vote in generous.votes] == pytest.approx([0.6, 0.3, 0.1])


def test_neighbours_in_other_directions_do_not_take_part():
    memory = Memory()
    remember(memory, "no", v=NORTH, rewards=1.0)
    remember(memory, "no", v=-EAST, rewards=1.0)
    consensus = ask(make(memory), "yes", 0.4, store=False)
    assert (consensus.answer, consensus.confidence) == ("yes", 0.4)
    assert not consensus.used_memory
    assert memory.writes[2:] == []


@pytest.mark.parametrize(
    ("metric", "similarity", "expected"),
    [("cosine", 0.5, 0.5), ("l2", -1.0, 0.5), ("l2", 0.0, 1.0), ("inner_product", 40.0, 1.0)],
)
def test_similarities_of_every_metric_count_at_most_one(metric, similarity, expected):
    memory = Memory(similarity_power=1.0)
    memory.config.embedding.metric = metric
    remember(memory, "a", rewards=1.0)
    hit = Hit(memory.experiences[0], similarity, memory)
    memory.search_index = lambda **_: SearchResult([hit], "receipt")
    assert ask(make(memory), "b", 0.0, store=False).votes[0].weight == pytest.approx(expected)


def test_ties_go_to_the_model():
    memory = Memory()
    remember(memory, "a", rewards=1.0)
    assert ask(make(memory), "b", 1.0, store=False).answer == "b"


def test_without_a_vote_of_its_own_the_model_still_answers_alone():
    ensemble = make(Memory(), model_weight=0.0)
    assert ask(ensemble, "b", 0.7, store=False).confidence == 0.7
    memory = Memory()
    remember(memory, "a", rewards=1.0)
    consensus = ask(make(memory, model_weight=0.0), "b", 0.7, store=False)
    assert (consensus.answer, consensus.confidence) == ("a", 1.0)


# ---------------------------------------------------------------- grouping answers


def test_free_form_answers_are_grouped():
    memory = Memory()
    remember(memory, " Seven ", rewards=1.0)
    remember(memory, "seven", rewards=1.0)
    consensus = ask(make(memory), "SEVEN", 0.1, store=False)
    assert len(consensus.votes) == 1
    assert consensus.answer == "SEVEN"  # the model's own words
    other = ask(make(memory), "eight", 0.1, v=between(0.99), store=False)
    assert other.answer == " Seven "


@pytest.mark.parametrize("wrong", [{"vote_key": 5}, {"clock": 5}])
def test_functions_must_be_such(wrong):
    with pytest.raises(ConfigError, match="must be a function, not 5"):
        make(Memory(), **wrong)


def test_a_vote_key_of_the_callers():
    memory = Memory()
    remember(memory, {"digit": 7, "why": "a bar"}, rewards=1.0)
    remember(memory, {"digit": 7, "why": "a hook"}, rewards=1.0)
    ensemble = make(memory, vote_key=lambda answer: answer["digit"])
    consensus = ask(ensemble, {"digit": 7, "why": "looks so"}, 0.1, store=False)
    assert consensus.answer == {"digit": 7, "why": "looks so"}
    assert len(consensus.votes) == 1
    assert len(ask(make(memory), {"digit": 7}, 0.1, store=False).votes) == 3
    by_tree = make(memory, vote_key=lambda answer: {"digit": [answer["digit"]]})
    assert len(ask(by_tree, {"digit": 7}, 0.1, store=False).votes) == 1


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Yes ", "yes", True),
        ("yes", "no", False),
        (3, 3.0, True),
        (1, True, False),
        ("3", 3, False),
        (None, "none", False),
        ({"a": 1, "b": [2]}, {"b": [2.0], "a": 1}, True),
        ({"a": 1}, {"a": 2}, False),
        ([1, 2], (1, 2), True),
        ([1, 2], np.array([1, 2]), True),
        ([1, 2], [2, 1], False),
        (np.float32(0.5), 0.5, True),
        (np.array([[1]]), [[1]], True),
        (b"x", bytearray(b"x"), True),
        (math.nan, float("nan"), True),
        ({1, 2}, {1, 2}, True),
        (range(3), range(3), True),
    ],
)
def test_same_answer(one, other, same):
    assert (same_answer(one) == same_answer(other)) is same
    assert len({same_answer(one), same_answer(other)}) == (1 if same else 2)


json_trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(json_trees)
def test_every_json_tree_can_be_grouped(tree):
    assert len({same_answer(tree), same_answer(tree)}) == 1


# ---------------------------------------------------------------- outcomes


def test_a_confident_consensus_counts_as_a_success_of_those_that_agreed():
    memory = Memory()
    remember(memory, "yes", rewards=1.0)
    remember(memory, "no", rewards=1.0, v=between(0.5))
    memory.writes.clear()
    consensus = ask(make(memory), "yes", 0.9)
    assert consensus.confidence >= 0.6
    assert consensus.recorded
    (_, added), (_, receipt, success, credit) = memory.writes
    assert added == consensus.experience_id
    assert (receipt, success) == (consensus.receipt, True)
    assert credit.dtype == np.float32
    assert credit.tolist() == [1.0, 0.0] == list(consensus.credit)


def test_a_doubtful_consensus_counts_a_retrieval_and_no_success():
    memory = Memory()
    remember(memory, "yes", confidence=0.2)
    consensus = ask(make(memory), "no", 0.3, store=False)
    assert consensus.confidence < 0.6
    assert memory.writes[1:] == [("outcome", consensus.receipt, False, None)]


@pytest.mark.parametrize("correct", [True, False])
def test_with_await_feedback_the_outcome_waits(correct):
    memory = Memory()
    remember(memory, "yes", rewards=1.0)
    ensemble = make(memory, await_feedback=True)
    consensus = ask(ensemble, "yes", 0.9)
    assert not consensus.recorded
    memory.writes.clear()
    ensemble.feedback(consensus, correct)
    reward, outcome = memory.writes
    assert reward == ("reward", 1, 1.0 if correct else -1.0)
    assert outcome[:3] == ("outcome", consensus.receipt, correct)
    assert outcome[3] is None if not correct else outcome[3].tolist() == [1.0]
    ensemble.feedback(consensus, correct)  # the receipt makes it count once
    assert len(memory.applied) == 1


def test_feedback_after_a_recorded_outcome_gives_the_reward_only():
    memory = Memory()
    remember(memory, "yes", rewards=1.0)
    ensemble = make(memory)
    consensus = ask(ensemble, "yes", 0.9)
    memory.writes.clear()
    ensemble.feedback(consensus, True, reward=0.7)
    ensemble.feedback(consensus, False, reward={"right": 0.0, "brief": -0.1})
    assert memory.writes == [("reward", 1, 0.7), ("reward", 1, {"right": 0.0, "brief": -0.1})]


def test_feedback_without_memory_or_storage_writes_nothing_needless():
    memory = Memory(min_experiences=99)
    ensemble = make(memory, await_feedback=True)
    ensemble.feedback(ask(ensemble, store=False), True)
    assert memory.writes == []
    consensus = ask(ensemble)
    ensemble.feedback(consensus, True)
    assert memory.writes == [("add", 0), ("reward", 0, 1.0)]


@pytest.mark.parametrize("bad", [None, "no", 0.5, math.nan, [], 2])
def test_feedback_is_right_or_wrong_and_nothing_between(bad):
    memory = Memory()
    remember(memory, "yes")
    ensemble = make(memory, await_feedback=True)
    consensus = ask(ensemble)
    before = list(memory.writes)
    with pytest.raises(InvalidExperience, match="correct must be True or False"):
        ensemble.feedback(consensus, bad)
    with pytest.raises(InvalidExperience, match="the Consensus that `answer` returned"):
        ensemble.feedback(bad, True)
    assert memory.writes == before
    ensemble.feedback(consensus, np.int64(1))


def test_feedback_changes_the_next_vote():
    memory = Memory()
    ensemble = make(memory)
    first = ask(ensemble, "3", 0.5)
    ensemble.feedback(first, False)
    assert ask(ensemble, "3", 0.5, store=False).confidence == 0.0
    ensemble.feedback(first, True)
    assert ask(ensemble, "8", 0.5, store=False).answer == "3"


# ---------------------------------------------------------------- what is stored


def test_the_consensus_is_stored_with_the_models_own_answer_beside_it():
    memory = Memory()
    remember(memory, "7", rewards=1.0)
    consensus = ask(
        make(memory), "1", 0.3, metadata={"scan": 5}, tags=("digit",), probabilities=[0.3, 0.7]
    )
    stored = memory.experiences[consensus.experience_id]
    assert (stored.answer, stored.confidence) == ("7", consensus.confidence)
    assert stored.metadata == {"scan": 5, "prediction": "1", "prediction_confidence": 0.3}
    assert stored.tags == ("digit",)
    assert stored.probabilities == [0.3, 0.7]
    assert stored.question == "which?"
    assert stored.rewards is None


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    "error", [CorruptionError("damaged"), UnknownExperienceError("gone", id=3), BufferClosed("x")]
)
def test_a_recall_that_fails_leaves_the_model_alone_with_a_warning(error, caplog):
    memory = Memory()
    remember(memory, "yes", rewards=1.0)
    memory.fail = error
    with caplog.at_level(logging.WARNING, "expbuf"):
        consensus = ask(make(memory), "no", 0.4)
    assert (consensus.answer, consensus.confidence) == ("no", 0.4)
    assert not consensus.used_memory
    assert type(error).__name__ in consensus.warning
    assert consensus.experience_id == 1  # it is remembered all the same
    assert [record.name for record in caplog.records] == ["expbuf"]
    assert "the model answers alone" in caplog.text


def test_an_experience_that_cannot_be_decoded_is_such_a_failure(caplog):
    memory = Memory()
    remember(memory, "yes", rewards=1.0, metadata={"damaged": True})
    consensus = ask(make(memory), "no", 0.4, store=False)
    assert consensus.answer == "no"
    assert "checksum mismatch" in consensus.warning
    assert "checksum mismatch" in caplog.text


def test_other_errors_are_not_swallowed():
    memory = Memory()
    remember(memory, "yes")
    memory.fail = TypeError("unexpected argument")
    with pytest.raises(TypeError):
        ask(make(memory))


def test_bad_input_is_refused_before_anything_is_written():
    memory = Memory()
    remember(memory, "yes", rewards=1.0)
    ensemble = make(memory)
    memory.writes.clear()
    for confidence in (-0.1, 1.1, math.nan, "high", None, True):
        with pytest.raises(InvalidExperience, match="confidence"):
            ask(ensemble, confidence=confidence)
    for probability in (-0.1, math.inf, math.nan, "x"):
        with pytest.raises(InvalidExperience, match="probabilities"):
            ask(ensemble, probabilities={"yes": probability})
    with pytest.raises(DimensionError):
        ask(ensemble, v=np.zeros(3, np.float32))
    with pytest.raises(TypeError, match="wights"):
        ask(ensemble, wights=1)
    with pytest.raises(TypeError, match="success_count"):
        ask(ensemble, success_count=1)
    assert memory.writes == []


@pytest.mark.parametrize(
    "option",
    [
        {"k": 0},
        {"k": 2.5},
        {"min_experiences": -1},
        {"confident": 1.5},
        {"model_weight": -1.0},
        {"model_weight": math.nan},
        {"similarity_power": "4"},
        {"half_life_s": 0.0},
        {"wrong_weight": -0.5},
    ],
)
def test_settings_out_of_bounds(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        make(Memory(), **option)


def test_settings_come_from_the_buffer_or_the_defaults():
    ensemble = make(Memory(k=3, half_life_s=60.0), confident=0.9)
    assert (ensemble.k, ensemble.half_life_s, ensemble.confident) == (3, 60.0, 0.9)
    assert make(Memory(half_life_s=60.0), half_life_s=math.inf).half_life_s == math.inf
    memory = Memory()
    del memory.config
    assert make(memory).half_life_s == math.inf


# ---------------------------------------------------------------- with a real buffer


@pytest.fixture
def buffer():
    module = pytest.importorskip("expbuf_core.buffer")
    with module.ExperienceBuffer.open(
        None,
        inference={"min_experiences": 5, "k": 5},
        index={"backend": "exact"},
        persistence={"backend": "memory"},
    ) as opened:
        yield opened


def test_an_agent_learns_from_whether_it_was_right(buffer):
    rng = np.random.default_rng(0)
    prototypes = rng.standard_normal((4, 16)).astype(np.float32)
    question = rng.standard_normal(16).astype(np.float32)
    ensemble = TemporalEnsemble(buffer, await_feedback=True)
    right = []
    for _ in range(200):
        kind = int(rng.integers(4))
        view = prototypes[kind] + 0.2 * rng.standard_normal(16).astype(np.float32)
        consensus = ensemble.answer(
            view,
            question,
            question="which kind?",
            prediction=str(rng.integers(4)),  # the model knows nothing
            confidence=0.25,
        )
        right.append(consensus.answer == str(kind))
        ensemble.feedback(consensus, right[-1])
    assert np.mean(right[:20]) <= 0.75
    assert np.mean(right[-100:]) > 0.95
    assert len(buffer) == 200


def test_outcomes_are_counted_once_on_those_that_took_part(buffer):
    rng = np.random.default_rng(1)
    v = rng.standard_normal(8).astype(np.float32)
    for answer in ("yes", "yes", "yes", "no", "yes"):
        buffer.add(Experience(v_embed=v, q_embed=v, answer=answer, confidence=0.9, rewards=1.0))
    ensemble = TemporalEnsemble(buffer, await_feedback=True)
    consensus = ensemble.answer(
        v, v, question="?", prediction="yes", confidence=0.5, probabilities={"yes": 0.5}
    )
    for _ in range(3):
        ensemble.feedback(consensus, True)
    counts = Counter()
    for id in consensus.neighbours:
        experience = buffer.get(id)
        assert experience.retrieval_count == 1
        counts[experience.answer, experience.success_count] += 1
    assert counts == {("yes", 1.0): 4, ("no", 0.0): 1}
    assert buffer.get(consensus.experience_id).total_reward == 1.0
    assert buffer.get(consensus.experience_id).retrieval_count == 0
