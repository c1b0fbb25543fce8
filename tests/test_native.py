"""The compiled module: what it and Python both know, its mutex, and when it is not used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from expbuf_core import codec, control, frames
from expbuf_core.intake import Accepted
from expbuf_core.native import FITS, misfit, native, why_not
from expbuf_file import layout

pytestmark = pytest.mark.skipif(native is None, reason=f"no native code: {why_not}")


# ---------------------------------------------------------------- numbers that both know


def test_words_and_sizes_agree() -> None:
    assert native is not None
    names = "GENERATION APPENDED NEXT_ID PUBLISHED DURABLE APPENDING FLUSHING FLUSH_FAILED"
    names += " RETIREMENTS RESERVED_ID RESERVED_LSN ROWS_ADDED WAITING_TO_APPEND"
    names += " WAITING_FOR_FLUSH NEXT_LSN ADAPTER"
    for name in names.split():
        assert getattr(native, f"W_{name}") == getattr(control, name), name
    assert native.W_COUNT == control.WORDS
    assert native.PAGE_BYTES == control.PAGE_BYTES
    assert native.MAGIC == frames.MAGIC
    assert native.FRAME_HEADER == frames.HEADER_BYTES
    assert native.ROW_HEADER == frames.ROW_HEADER_BYTES
    assert native.LOG_BEGIN == frames.LOG_BEGIN
    assert native.KIND_ADD == codec.ADD
    assert native.END_BYTES == layout.END_BYTES
    assert native.A_FIELDS == len(Accepted._fields)


def test_crc(rng: np.random.Generator) -> None:
    assert native is not None
    data = rng.bytes(70_000)
    for n in [*range(300), 1023, 4096, 65_537]:
        for at in (0, 1, 3, 8):
            part = memoryview(data)[at : at + n]
            assert native.crc32(part) == zlib.crc32(part)
            assert native.crc32(part, 0xDEADBEEF) == zlib.crc32(part, 0xDEADBEEF)


# ---------------------------------------------------------------- its mutex


def test_mutex_excludes_and_knows_its_owner() -> None:
    assert native is not None
    mutex, inside, most = native.Mutex(), [], []

    def work() -> None:
        for _ in range(2000):
            with mutex:
                assert mutex._is_owned()
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert not mutex._is_owned()
    with pytest.raises(RuntimeError, match="does not hold"):
        mutex.release()
    with mutex, pytest.raises(RuntimeError, match="already"):
        mutex.acquire()
    assert mutex.acquire(blocking=False)
    other: list[Any] = []
    thread = threading.Thread(
        target=lambda: other.extend(
            [mutex.acquire(False), mutex.acquire(timeout=0.01), mutex._is_owned()]
        )
    )
    thread.start()
    thread.join()
    assert other == [False, False, False]
    mutex.release()


# ---------------------------------------------------------------- without it


def test_what_was_built_for_another_version_is_not_used(tmp_path: Path) -> None:
    found = ModuleType("found")
    found.__file__ = "/there/_native.so"
    assert "its number is none" in misfit(found, tmp_path)  # before there was one
    found.FITS = FITS + 1  # type: ignore[attr-defined]
    assert misfit(found, tmp_path).endswith(f"its number is {FITS + 1}, expected {FITS}")
    found.FITS, source = FITS, tmp_path / "a.c"  # type: ignore[attr-defined]
    found.SOURCES = zlib.crc32(b"int a; int b;")  # type: ignore[attr-defined]
    assert not misfit(found, tmp_path)  # a wheel: no sources there
    source.write_bytes(b"int a; ")
    (tmp_path / "b.h").write_bytes(b"int b;")
    assert not misfit(found, tmp_path)
    source.write_bytes(b"int c; ")
    assert "other sources" in misfit(found, tmp_path)
    found.SOURCES = 0  # type: ignore[attr-defined]
    assert not misfit(found, tmp_path)  # compiled by hand: nobody knows


@pytest.mark.parametrize("what", ["as it is", "gone", "cut", "of another version"])
def test_works_with_whatever_lies_there(what: str, tmp_path: Path) -> None:
    import expbuf_core

    assert native is not None
    compiled = Path(native.__file__ or "")
    package = tmp_path / "expbuf_core"
    shutil.copytree(Path(expbuf_core.__file__).parent, package)
    there = package / "native" / compiled.name
    expected = ""
    if what == "gone":
        there.unlink()
        expected = "it was not compiled when"
    elif what == "cut":
        there.write_bytes(compiled.read_bytes()[:100])
        expected = compiled.name  # and what the system says
    elif what == "of another version":
        init = package / "native" / "__init__.py"
        text = init.read_text()
        assert f"\nFITS = {FITS}\n" in text
        init.write_text(text.replace(f"\nFITS = {FITS}\n", f"\nFITS = {FITS + 1}\n"))
        expected = f"its number is {FITS}, expected {FITS + 1}"
    code = (
        "import sys, numpy as np, expbuf_core\n"
        "assert expbuf_core.__file__.startswith(sys.argv[1]), expbuf_core.__file__\n"
        "from expbuf_core import Experience, ExperienceBuffer\n"
        "from expbuf_core.native import native, why_not\n"
        "v = np.ones(8, np.float32)\n"
        "with ExperienceBuffer.open(sys.argv[1] + '/b', index={'builder': 'off'}) as buffer:\n"
        "    buffer.add(Experience(v_embed=v, q_embed=v))\n"
        "print(native is None, why_not)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{what != 'as it is'} ")
    assert expected in done.stdout
