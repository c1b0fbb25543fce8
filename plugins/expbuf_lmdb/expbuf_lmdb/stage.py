"""The stage: a short log of commits that LMDB does not have yet."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from expbuf_core import frames
from expbuf_core.contracts import Buffer, LogInterrupted
from expbuf_core.crc import crc32
from expbuf_core.errors import StorageError
from expbuf_core.filesystem import FileSystem, open_to_read, storage_errors
from expbuf_lmdb import layout
from expbuf_lmdb.layout import STAGE_HEADER_BYTES, StageHeader

_WINDOW = 1 << 20
_FIRST_WINDOW = 1 << 14  # so that a frame that is larger than a window is not read twice
_ZEROS = bytes(1 << 20)


class StagedFrame(NamedTuple):
    """A frame in the stage. `data`: all of it, if it was asked for with its rows."""

    offset: int
    header: frames.Header
    data: memoryview


class _Reading:
    """A descriptor for reading. Closed with its last reference, so that no read loses it.

    Attributes:
        generation: One that was seen in this file; 0: none yet.
    """

    def __init__(self, path: Path) -> None:
        self.generation = 0
        self.fd = open_to_read(path)

    def __del__(self) -> None:
        fd = getattr(self, "fd", -1)
        if fd >= 0:
            self.fd = -1
            os.close(fd)


class Stage:
    """The file, open in this process.

    Whoever recovers may put another file in its place. A reader that is still there finds it by the
    generation that it looks for: each is in one file only, and its header is written first.

    Args:
        folder: Of the buffer.
        fs: Writes.
    """

    def __init__(self, folder: Path, fs: FileSystem) -> None:
        self.path = folder / layout.STAGE
        self._fs = fs
        self._reading: _Reading | None = None
        self._writing = -1

    def close(self) -> None:
        """Let go of the file."""
        self._reading = None
        if self._writing >= 0:
            self._fs.close(self._writing)
        self._writing = -1

    def _file(self) -> _Reading:
        file = self._reading
        if file is None:
            with storage_errors("open", self.path):
                file = self._reading = _Reading(self.path)
        return file

    def _file_of(self, generation: int) -> _Reading:
        """The file that this generation is in, if it is in any."""
        file = self._file()
        if file.generation != generation:
            header = self._header_in(file)
            if header is not None and header.generation == generation:
                file.generation = generation
            else:
                self._reading = None
                file = self._file()
        return file

    def _writable(self) -> int:
        if self._writing < 0:
            with storage_errors("open", self.path):
                self._writing = self._fs.open(self.path)
        return self._writing

    # ------------------------------------------------------------ writing

    def make(self, header: StageHeader) -> None:
        """Let an empty stage appear, durable. It never grows: a full disk cannot stop it."""
        self.close()

        def content() -> Iterator[Buffer]:
            yield layout.encode_stage_header(header).ljust(STAGE_HEADER_BYTES, b"\0")
            for at in range(STAGE_HEADER_BYTES, header.size, len(_ZEROS)):
                yield memoryview(_ZEROS)[: header.size - at]

        with storage_errors("create", self.path):
            self._fs.write_atomically(self.path, content())

    def begin(self, header: StageHeader, *, durable: bool) -> None:
        """Begin it anew, in place. Frames of an older generation mean nothing from now on."""
        fd = self._writable()
        with storage_errors("write", self.path):
            self._fs.pwrite(fd, layout.encode_stage_header(header), 0)
            if durable:
                self._fs.fdatasync(fd)

    def write(self, parts: Sequence[Buffer], offset: int) -> None:
        """Write frames, or nothing.

        Raises:
            LogInterrupted: They may have been written in part.
        """
        fd = self._writable()
        try:
            with storage_errors("write", self.path):
                self._fs.pwritev(fd, parts, offset)
        except StorageError as exc:
            try:
                # Without its header the first frame is none; what is behind is not looked at.
                self._fs.pwrite(fd, bytes(frames.HEADER_BYTES), offset)
            except OSError as undo:
                raise LogInterrupted(f"{exc}; undoing it failed, too: {undo}") from exc
            raise

    # ------------------------------------------------------------ reading

    def header(self) -> StageHeader | None:
        """The first page; None if it is damaged.

        Raises:
            FormatVersionError: A newer version wrote it.
            StorageError: The file is missing or cannot be read.
        """
        if self._reading is None and not self.path.exists():
            raise layout.corrupt(self.path, "the file is missing")
        return self._header_in(self._file())

    def _header_in(self, file: _Reading) -> StageHeader | None:
        with storage_errors("read", self.path):
            raw = os.pread(file.fd, STAGE_HEADER_BYTES, 0)
        return layout.decode_stage_header(raw, self.path)

    def size(self) -> int:
        """Bytes of it. It never grows, so what stands in the file behind them is not its own."""
        file = self._file()
        header, size = self._header_in(file), os.fstat(file.fd).st_size
        return size if header is None else min(size, header.size)

    def read(self, generation: int, offset: int, length: int) -> bytes:
        """Up to so many bytes of the file that this generation is, or was, in."""
        file = self._file_of(generation)
        with storage_errors("read", self.path):
            return os.pread(file.fd, length, offset)

    def frames(
        self, offset: int, end: int, salt: bytes, generation: int, base: int
    ) -> Iterator[StagedFrame]:
        """Frames from `offset` on, up to `end` or the first that is none. Headers are checked."""
        salt_crc = crc32(salt)
        epoch = generation & 0xFFFFFFFF
        window, start, step = b"", offset, _FIRST_WINDOW
        while offset + frames.HEADER_BYTES <= end:
            at = offset - start
            if at + frames.HEADER_BYTES > len(window):
                window = self.read(generation, offset, min(step, end - offset))
                start, at = offset, 0
                step = _WINDOW
            header = frames.decode_header(window, at, salt_crc)
            if header is None or header.epoch != epoch or header.data_offset != base + offset:
                return
            size = header.data_bytes
            if offset + size > end:
                return
            if at + size > len(window):
                window = self.read(generation, offset, max(size, _WINDOW))
                start, at = offset, 0
                if size > len(window):
                    return
            yield StagedFrame(offset, header, memoryview(window)[at : at + size])
            offset += size

    def proof(self, salt: bytes, generation: int) -> int:
        """The highest LSN that any frame in it says was durable."""
        best, salt_crc = 0, crc32(salt)
        with contextlib.suppress(StorageError):
            for start in range(STAGE_HEADER_BYTES, self.size(), _WINDOW):
                # A header that begins in this part may end behind it.
                raw = self.read(generation, start, _WINDOW + frames.HEADER_BYTES)
                at = 0
                while (found := frames.find_header(raw, at, salt_crc)) is not None:
                    if found[1].epoch == generation & 0xFFFFFFFF:
                        best = max(best, found[1].durable_before)
                    at = found[0] + 8
        return best
