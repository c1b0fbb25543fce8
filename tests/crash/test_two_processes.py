"""What goes wrong in either process fails the test."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from two_processes import explore_in_two, in_two_processes

from expbuf_core.testing.crash import Check
from expbuf_core.testing.recording import NoFsync


def test_both_answer() -> None:
    there, here = in_two_processes(lambda part: [part, os.getpid()])
    assert (there[0], here[0]) == (0, 1)
    assert there[1] != here[1] == os.getpid()


@pytest.mark.parametrize("part", [0, 1])
def test_an_error_in_either_is_one(part: int) -> None:
    def task(which: int) -> None:
        assert which != part, "this is wrong"

    with pytest.raises(AssertionError, match="this is wrong"):
        in_two_processes(task)


def test_a_death_is_an_error() -> None:
    def task(part: int) -> None:
        if part == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(AssertionError, match="the other process died: -9"):
        in_two_processes(task)


@pytest.mark.parametrize("part", [0, 1])
def test_every_state_is_checked_in_one_of_them(part: int) -> None:
    def work(fs: Any, folder: Any, ack: Any) -> None:
        fs.mkdir(folder)
        for number in range(9):
            fs.mkdir(folder / str(number))

    def only_in(which: int) -> Check:
        parent = os.getpid()
        return lambda *_: 1 / 0 if (os.getpid() == parent) == which else None

    def nothing(*_: object) -> None:
        pass

    assert explore_in_two(work, nothing, begin=nothing, states=20, broken=NoFsync) > 10
    with pytest.raises(AssertionError, match="states broke a promise"):
        explore_in_two(work, only_in(part), begin=nothing, states=20)
