"""Reading the log after a crash: what is intact, what is a torn tail, what is damage."""

from __future__ import annotations

from collections.abc import Generator, Iterator

from expbuf_core import frames
from expbuf_core.contracts import LoggedOperation, LoggedRun, behind, last_of, one_by_one
from expbuf_core.errors import CorruptionError
from expbuf_file import layout
from expbuf_file.logfile import NO_BOUND, BadFrame, Begin, Frame, LogFile
from expbuf_file.logfolder import LogFolder


class LogReader:
    """One pass over the log.

    Attributes:
        last_lsn: Of the last intact operation.
        number: File that it stands in.
        end: Where it ends there.
        torn_bytes: Behind it, and left out.
        scanned: Files that were read, each with the end of what is intact in it.
        unproven: Where in a file the operations begin that this boot never called durable.
    """

    def __init__(self, logs: LogFolder) -> None:
        self._logs = logs
        self.last_lsn = 0
        self.number = 0
        self.end = 0
        self.torn_bytes = 0
        self.scanned: dict[int, int] = {}
        self.unproven: dict[int, int] = {}

    def recover(self, after_lsn: int, durable_lsn: int) -> Iterator[LoggedOperation]:
        """See `PersistenceAdapter.recover`."""
        return one_by_one(self.recover_alike(after_lsn, durable_lsn))

    def recover_alike(
        self, after_lsn: int, durable_lsn: int
    ) -> Iterator[LoggedOperation | LoggedRun]:
        """See `PersistenceAdapter.recover_alike`."""
        self._logs.begins.clear()
        chain = self._logs.chain(after_lsn)
        files = list(chain)
        while len(files) > 1 and chain[files[1]].previous_lsn <= after_lsn:
            del files[0]
        if not files or chain[files[0]].previous_lsn > after_lsn:
            first = f"begins at lsn {chain[files[0]].lsn}" if files else "is missing"
            raise CorruptionError(
                f"{self._logs.path}: the log {first}, but operations from lsn {after_lsn + 1} on "
                "are needed: log files were deleted or damaged. Run `expbuf verify`",
                path=layout.path_of(self._logs.path, layout.DATA, files[0] if files else 1),
                lsn=after_lsn + 1,
            )
        self.last_lsn = after_lsn
        for number, following in zip(files, [*files[1:], 0], strict=True):
            intact = yield from self._recover_file(
                number, chain[number], chain.get(following), durable_lsn
            )
            if not intact:
                return
        # Nothing is torn; is anything missing behind the end?
        lsn = self.last_lsn + 1
        proof = max(durable_lsn, self._proof_behind(files[-1]))
        if proof >= lsn:
            missing = BadFrame(self.end, self.end, f"lsn {proof} was durable and is missing")
            raise self._logs.shared(layout.DATA, self.number).corrupt(missing, lsn)

    def _recover_file(
        self, number: int, begin: Begin, successor: Begin | None, durable_lsn: int
    ) -> Generator[LoggedOperation | LoggedRun, None, bool]:
        """Yield a file's operations; return whether it ends where it should."""
        file = self._logs.open(layout.DATA, number)
        self.number, self.end = number, begin.end
        self.scanned[number] = begin.end
        size = file.size()
        limit = successor.previous_end if successor else size
        lsn = begin.lsn
        bad: BadFrame | None = None
        sealed = False
        offset = begin.end
        while offset < limit:
            # What this boot never called durable begins with a stretch of its own.
            proven = lsn <= durable_lsn
            until = durable_lsn if proven else NO_BOUND
            items, end = file.alike(offset, limit, rows=True, lsn=lsn, until_lsn=until)
            if not items:
                found = file.frame(offset, limit, rows=True)
                if isinstance(found, BadFrame):
                    bad = found
                    break
                header = found.header
                if header.kind == frames.LOG_END:
                    sealed = True
                    self._check_successor(file, found, lsn)
                    break
                end = found.end
                if header.kind == frames.LOG_BEGIN:
                    lsn = header.lsn  # LSNs jump where a log was given up
                elif header.lsn != lsn:
                    bad = BadFrame(found.offset, found.offset, f"lsn {header.lsn} out of order")
                    break
                else:
                    items = [file.operation(found)]
            if items:
                if 0 < durable_lsn < lsn:
                    self.unproven.setdefault(number, offset)
                for item in behind(items, self.last_lsn):
                    self.last_lsn, self.end = last_of(item), end
                    yield item
                lsn = last_of(items[-1]) + 1
            self.end = self.scanned[number] = offset = end
        if size < (limit if successor else file.header.size) and not sealed:
            # Sizes are made durable before a file is used: this is no torn tail.
            if bad is not None and file.proof(bad.offset + 8, size):
                raise file.corrupt(bad, lsn)  # what stands behind it says that it was not cut there
            raise file.corrupt(BadFrame(self.end, size, "the file was cut"), lsn)
        if bad is not None:
            self._judge(file, bad, lsn, min(limit, size), durable_lsn)
            return False
        if successor and successor.previous_lsn not in (lsn - 1, self.last_lsn):
            raise file.corrupt(BadFrame(limit, limit, "operations are missing"), lsn)
        return True

    def _check_successor(self, file: LogFile, found: Frame, lsn: int) -> None:
        """See that the file which an end frame names is there."""
        (following,) = layout.END_BODY.unpack(found.body)
        path = layout.path_of(self._logs.path, layout.DATA, following)
        if following and not path.exists():
            missing = BadFrame(found.offset, found.offset, f"log file {following} is missing")
            raise file.corrupt(missing, lsn)

    def _judge(self, file: LogFile, bad: BadFrame, lsn: int, limit: int, durable_lsn: int) -> None:
        """Return if the operations from `lsn` on are a torn tail; raise if they are damaged.

        A flush of several pages may leave holes, so valid frames behind a bad one prove nothing
        by themselves; what counts is whether anything says that this LSN had been durable.
        """
        end = file.last_nonzero(bad.offset, limit)
        proof = max(durable_lsn, file.proof(bad.offset + 8, end), self._proof_behind(file.number))
        if proof >= lsn:
            raise file.corrupt(bad, lsn)
        self.torn_bytes = end - bad.offset

    def _proof_behind(self, number: int) -> int:
        """The highest LSN that any later file says was durable."""
        proof = 0
        for later in layout.numbers(self._logs.path, layout.DATA):
            if later > number:
                file = self._logs.open(layout.DATA, later)
                self._logs.begin(later)  # raises where its first frame must be there and is not
                proof = max(proof, file.proof(layout.HEADER_BYTES, file.size()))
        return proof
