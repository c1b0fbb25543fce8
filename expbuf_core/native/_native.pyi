from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, NoReturn

FITS: int
SOURCES: int

def crc32(data: bytes | bytearray | memoryview, start: int = 0, /) -> int: ...
def run(
    window: memoryview,
    at: int,
    end: int,
    stands_at: int,
    limit: int,
    epoch: int,
    salt_crc: int,
    data_log: bool,
    rows: bool,
    lsn: int | None,
    until_lsn: int,
    least: int,
    /,
) -> tuple[int, int, int, bytearray, bytearray, int, int, bytearray | None] | None: ...

class Encoder:
    def __init__(
        self,
        *,
        experience: type,
        accepted: type[tuple[Any, ...]],
        array: type,
        memmap: type,
        scalars: tuple[type, ...],
        fsum: Callable[[Iterable[float]], float],
        v_dim: int,
        q_dim: int,
        dim: int,
        max_row: int,
        concat: bool,
        normalize: bool,
        cosine: bool,
        v_factor: float,
        q_factor: float,
        scores: bool,
        uncertainty: float,
        reward: float,
        age: float,
        half_life: float,
    ) -> None: ...
    def accept(self, experience: object, priority: object, now: float, /) -> Any | None: ...

class Adder:
    def __init__(
        self,
        *,
        encoder: Encoder,
        log: Log,
        labels_of: Callable[[Any], bytes | None],
        clock: ModuleType,
        inside: set[int],
        observers: tuple[Any, ...],
        representation: int,
        tells: bool,
    ) -> None: ...
    def add(
        self, experience: object, priority: object, /
    ) -> int | tuple[int, int, int | None] | None: ...
    def until(
        self,
        appended: int,
        next_id: int,
        rows_added: int,
        damaged_index: int,
        file: int,
        data_end: int,
        /,
    ) -> None: ...

class Mutex:
    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool: ...
    def release(self) -> None: ...
    def _is_owned(self) -> bool: ...
    def __enter__(self) -> bool: ...
    def __exit__(self, *exc: object) -> None: ...

class Log:
    @property
    def inside(self) -> int: ...
    @property
    def watchers(self) -> int: ...
    @property
    def data_size(self) -> int: ...
    def __init__(
        self,
        *,
        words: memoryview,
        control: str,
        inode: int,
        generation: int,
        append_mutex: Mutex,
        append_fd: int,
        flush_mutex: Mutex,
        flush_fd: int,
        fail: Callable[[str, BaseException], NoReturn],
        fs: object | None,
        syncs: bool,
        reserves: bool,
        max_commit: int,
        patience: float,
    ) -> None: ...
    def add(
        self, accepted: object, representation: int, labels_of: Callable[[Any], bytes | None], /
    ) -> tuple[int, int, int | None] | None: ...
    def append_to(
        self,
        data_fd: int,
        index_fd: int,
        number: int,
        data_size: int,
        index_size: int,
        salt_crc: int,
        /,
    ) -> None: ...
    def append_nowhere(self) -> None: ...
    def sync_with(self, fd: int, number: int, /) -> None: ...
    def sync_nothing(self) -> None: ...
    def shut(self) -> None: ...
    def close(self) -> None: ...
    def abandon(self) -> None: ...
