"""The world of the agent: scans of handwritten digits, and questions about them.

Every scan comes once, in random order, with a question of a random kind in a random phrasing. The
agent is told whether its answer was right, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

ANSWERS = (*"0123456789", "yes", "no")
"""All that can be said. Which of it fits which question, the agent has to find out."""

_LOOPS = {0: 1, 6: 1, 8: 2, 9: 1}  # a handwritten 4 is mostly open


@dataclass(frozen=True)
class Kind:
    """A kind of question.

    Attributes:
        name: For tables.
        phrasings: How it may be put.
        answer: The right answer for a digit.
    """

    name: str
    phrasings: tuple[str, ...]
    answer: Callable[[int], str]


KINDS = (
    Kind(
        "which digit",
        (
            "which digit is this?",
            "what digit do you see?",
            "name the digit in the picture",
            "which number is written here?",
        ),
        str,
    ),
    Kind(
        "odd",
        (
            "is it odd?",
            "is this an odd number?",
            "is the digit odd?",
            "would you call this number odd?",
        ),
        lambda digit: "yes" if digit % 2 else "no",
    ),
    Kind(
        "larger than four",
        (
            "is it larger than four?",
            "is this more than four?",
            "does the digit exceed four?",
            "is the number greater than four?",
        ),
        lambda digit: "yes" if digit > 4 else "no",
    ),
    Kind(
        "closed loops",
        (
            "how many closed loops does it have?",
            "count the closed loops",
            "how many holes are in this digit?",
            "how many loops do you count?",
        ),
        lambda digit: str(_LOOPS.get(digit, 0)),
    ),
)


@dataclass(frozen=True)
class Question:
    """One question about one scan.

    Attributes:
        position: In the stream, from 0.
        scan: Which scan, from 0.
        pixels: (8, 8) float32 in [0, 1].
        kind: Index into `KINDS`.
        text: The question.
    """

    position: int
    scan: int
    pixels: NDArray[np.float32]
    kind: int
    text: str


class Scans(NamedTuple):
    """Scanned digits.

    Attributes:
        images: (n, 8, 8) float32 in [0, 1].
        digits: (n,) int64: what they show.
    """

    images: NDArray[np.float32]
    digits: NDArray[np.int64]

    @classmethod
    def load(cls) -> Scans:
        """The 1797 scans that come with scikit-learn."""
        from sklearn.datasets import load_digits  # takes a second, which no agent needs to wait

        bundled = load_digits()
        images = (bundled.images / 16.0).astype(np.float32)
        return cls(images, bundled.target.astype(np.int64))

    def write(self, path: Path) -> None:
        """Put them into a file, from which `read` gets them faster."""
        np.savez(path, images=self.images, digits=self.digits)

    @classmethod
    def read(cls, path: Path) -> Scans:
        """The inverse of `write`."""
        with np.load(path) as file:
            return cls(file["images"], file["digits"])


class World:
    """A stream of questions, and who knows the answers.

    Args:
        scans: What they are about.
        seed: The same seed, the same stream.
        questions: Length; None: every scan once.
    """

    def __init__(self, scans: Scans, seed: int, questions: int | None = None) -> None:
        self.seed = seed
        self._scans = scans
        rng = np.random.default_rng(seed)
        self._order = rng.permutation(len(scans.digits))[:questions]
        self._kinds = rng.integers(len(KINDS), size=len(self._order))
        self._draws = rng.random(len(self._order))

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> Question:
        scan, kind = int(self._order[position]), int(self._kinds[position])
        phrasings = KINDS[kind].phrasings
        text = phrasings[int(self._draws[position] * len(phrasings))]
        return Question(position, scan, self._scans.images[scan], kind, text)

    def judge(self, position: int, answer: Any) -> bool:
        """Whether an answer is right: the only thing that the agent is ever told."""
        right = KINDS[int(self._kinds[position])].answer(
            int(self._scans.digits[self._order[position]])
        )
        return bool(answer == right)

    def last_of_each_kind(self) -> tuple[int, ...]:
        """Positions, one a kind."""
        return tuple(int(np.flatnonzero(self._kinds == kind)[-1]) for kind in set(self._kinds))
