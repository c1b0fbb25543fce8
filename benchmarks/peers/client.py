"""The harness's side: starting workers, commanding them, laying out what they share."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import Dataset, nearest
from benchmarks.peers import PEERS
from benchmarks.peers.base import K, NotOffered

HERE = Path(__file__).resolve().parents[2]


class PeerFailed(Exception):
    """A worker ended, raised, or took too long; the message says which."""


def lay_out(folder: Path, data: Dataset, n: int, texts: Sequence[str]) -> None:
    """Write what all workers map: vectors, queries, exact results among the first n, texts."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "vectors.npy", data.vectors)
    np.save(folder / "queries.npy", data.queries)
    np.save(folder / "truth.npy", nearest(data.vectors[:n], data.queries, K))
    (folder / "texts.json").write_text(json.dumps(list(texts)), encoding="utf-8")


def interpreter(name: str, peers_python: Path) -> str:
    return sys.executable if PEERS[name].ours else str(peers_python)


class Client:
    """A worker process, and the peer in it.

    Attributes:
        facts: What the peer says of itself: versions, what survives, how it is set up.

    Raises:
        PeerFailed: It cannot be imported.
    """

    def __init__(self, name: str, peers_python: Path, log: Path) -> None:
        self.name = name
        self._log = log
        self._busy = True  # until it has said what it is
        program = interpreter(name, peers_python)
        if not os.path.exists(program):
            raise PeerFailed(f"no {program}: make bench-peers")
        with open(log, "ab") as errors:
            self._process = subprocess.Popen(
                [program, "-m", "benchmarks.peers.worker", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=HERE,
                env={**os.environ, "PYTHONPATH": str(HERE), "TOKENIZERS_PARALLELISM": "false"},
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stdout, selectors.EVENT_READ)
        self.facts: dict[str, Any] = self.answer(120)

    def send(self, do: str, **arguments: Any) -> None:
        """Give a command without waiting."""
        self._busy = True
        try:
            self._stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._stdin.flush()
        except (OSError, ValueError) as exc:
            raise PeerFailed(f"the process has ended: {self._last_words()}") from exc

    def answer(self, timeout_s: float) -> Any:
        """Wait for the answer to the last command.

        Raises:
            NotOffered: The peer has no such operation.
            PeerFailed: It raised, ended, or did not answer in time; it is killed then.
        """
        if not self._selector.select(timeout_s):
            self.kill()
            raise PeerFailed(f"not done within {timeout_s:.0f} s")
        line = self._stdout.readline()
        self._busy = False
        if not line:
            raise PeerFailed(f"the process has ended: {self._last_words()}")
        reply = json.loads(line)
        if "not_offered" in reply:
            raise NotOffered(reply["not_offered"])
        if "error" in reply:
            raise PeerFailed(reply["error"][:300])
        return reply["result"]

    def __call__(self, do: str, *, timeout_s: float = 120, **arguments: Any) -> Any:
        self.send(do, **arguments)
        return self.answer(timeout_s)

    def kill(self) -> None:
        """SIGKILL, as a crash would be."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """Close the peer and end the process; by force if it is still at work."""
        try:
            if self._process.poll() is None and not self._busy:
                self("close", timeout_s=60)
                self._stdin.close()
                self._process.wait(20)
        except (PeerFailed, NotOffered, OSError, subprocess.TimeoutExpired):
            pass
        finally:
            if self._process.poll() is None:
                self.kill()
            self._selector.close()
            self._stdout.close()
            with suppress(OSError):  # what was not sent to a killed process
                self._stdin.close()

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "no message"


def warm_up(client: Client, folder: Path, data: Path, *, replay: bool) -> None:
    """Open and use a small store once, so that what a library does once is not timed."""
    with suppress(NotOffered):
        client("open", folder=str(folder), data=str(data), capacity=2000)
        if not client("count"):
            client("load", n=500)
        client("ready")
        with suppress(NotOffered):
            client("save")
        client("first_use", replay=replay)
        client("close")


def disk_bytes(folder: Path) -> int:
    """Bytes that the file system has given to the files of a folder."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
