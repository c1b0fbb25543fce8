"""Sleeping on words that processes share."""

from __future__ import annotations

import os
import threading
import time
import warnings
from pathlib import Path

import pytest

from expbuf_core import control as c
from expbuf_core.control import Control
from expbuf_core.waiting import _FUTEX

LONG_S = 0.9  # far longer than any of these should take
needs_futex = pytest.mark.skipif(_FUTEX is None, reason="no futex on this platform")


@pytest.fixture
def control(tmp_path: Path) -> Control:
    return Control.map(tmp_path / "control", writable=True)


def sleep_until_told(control: Control, seen: int) -> int:
    """How often it had to look."""
    looks = 0
    while control.words[c.DURABLE] == seen:
        control.await_change(c.DURABLE, c.WAITING_FOR_FLUSH, seen, LONG_S)
        looks += 1
    return looks


@needs_futex
def test_a_sleeper_in_another_process_is_woken(control: Control, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        other = Control.map(tmp_path / "control", writable=True)
        os._exit(10 + sleep_until_told(other, 0))
    woken = 0
    while not woken:  # it may not have gone to sleep yet
        time.sleep(0)
        if control.words[c.WAITING_FOR_FLUSH]:
            woken = control._bell.ring(c.DURABLE, 1) if control._bell else 0
    control.words[c.DURABLE] = 5
    control.tell(c.DURABLE, c.WAITING_FOR_FLUSH, 1 << 30)
    _, status = os.waitpid(child, 0)
    assert 11 <= os.waitstatus_to_exitcode(status) < 20


def test_a_word_that_has_changed_is_not_waited_for(control: Control) -> None:
    control.words[c.DURABLE] = 7
    started = time.monotonic()
    for _ in range(100):
        control.await_change(c.DURABLE, c.WAITING_FOR_FLUSH, 6, LONG_S)
    assert time.monotonic() - started < 50 * LONG_S


def test_a_lost_wake_up_is_survived(control: Control) -> None:
    timer = threading.Timer(0.01, lambda: control.words.__setitem__(c.DURABLE, 1))
    timer.start()
    try:
        while control.words[c.DURABLE] == 0:
            control.await_change(c.DURABLE, c.WAITING_FOR_FLUSH, 0, 0.005)
    finally:
        timer.join()


def test_telling_nobody_forgets_the_hint(control: Control) -> None:
    control.words[c.WAITING_FOR_FLUSH] = 1
    control.tell(c.DURABLE, c.WAITING_FOR_FLUSH, 1)
    if _FUTEX is not None:
        assert control.words[c.WAITING_FOR_FLUSH] == 0


def test_only_the_lower_half_of_a_word_is_compared(control: Control) -> None:
    control.words[c.DURABLE] = (3 << 32) + 9
    control.await_change(c.DURABLE, c.WAITING_FOR_FLUSH, (3 << 32) + 9, 0.001)
    control.await_change(c.DURABLE, c.WAITING_FOR_FLUSH, 8, LONG_S)


def test_it_can_be_closed(control: Control) -> None:
    control.await_change(c.DURABLE, c.WAITING_FOR_FLUSH, 0, 0.001)
    control.close()
    control.tell(c.DURABLE, c.WAITING_FOR_FLUSH, 1)
