"""FORMAT.md says what the code does: tables, words and the example are compared."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from expbuf_core.frames import HEADER_BYTES
from expbuf_lmdb import layout
from expbuf_lmdb.adapter import _DELETED_AT_ONCE, _MOST_ROOM_AHEAD, _RESERVE, _TAIL

TEXT = (Path(__file__).parents[1] / "FORMAT.md").read_text(encoding="utf-8")
TYPES = {"u32": "I", "u64": "Q", "8 bytes": "8s", "16 bytes": "16s", "zeros": "4x"}
SALT = bytes(range(16, 32))


def table_behind(mark: str) -> list[list[str]]:
    _, found, rest = TEXT.partition(f"<!-- {mark} -->\n")
    assert found, mark
    lines = rest.split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip().split("|")[1:-1]] for line in lines]


@pytest.mark.parametrize("name", ["_HEADER", "_STATE", "_BEGIN", "_STAGE_HEADER"])
def test_structures(name: str) -> None:
    form = "<"
    for offset, size, kind, _ in table_behind(f"struct: {name}"):
        assert struct.calcsize(form) == int(offset)
        form += TYPES[kind]
        assert struct.calcsize(form) == int(offset) + int(size)
    wanted: struct.Struct = getattr(layout, name)
    assert struct.Struct(form).size == wanted.size
    assert form == re.sub(r"(\d*)Q", lambda m: "Q" * int(m[1] or 1), wanted.format)


def test_words() -> None:
    found = {name: int(number) for number, name, _ in table_behind("words")}
    names = ("GENERATION", "END", "BASE", "LAST", "STORED", "DRAINED")
    assert found == {name: getattr(layout, name) for name in names}


def test_the_example_is_what_is_written() -> None:
    _, _, rest = TEXT.partition("<!-- example -->\n```text\n")
    lines = rest.partition("```")[0].splitlines()
    documented = bytes.fromhex("".join(line[8:] for line in lines))
    header = layout.StageHeader(bytes(range(16)), SALT, 1, 0, 0, 4 << 20)
    assert layout.encode_stage_header(header) == documented
    assert layout.decode_stage_header(documented, Path("stage.wal")) == header


def test_records() -> None:
    path = Path("log.mdb")
    uuid = bytes(range(16))
    assert layout.decode_header(layout.encode_header(uuid, SALT), path, uuid) == SALT
    state = layout.State(3, 4096, 2)
    assert layout.decode_state(layout.encode_state(state, SALT), path, SALT) == state
    assert layout.decode_begin(layout.encode_begin(90, 7, SALT), 90, SALT) == 7
    assert layout.decode_begin(layout.encode_begin(90, 7, SALT), 91, SALT) is None
    assert layout.begin_key(258) == b"begin" + bytes([0, 0, 0, 0, 0, 0, 1, 2])
    assert layout.number(layout.key(1 << 40)) == 1 << 40


def test_numbers_in_the_text() -> None:
    assert (layout.DATA, layout.STAGE, layout.LOCK) == ("log.mdb", "stage.wal", "log.mdb-lock")
    assert layout.STAGE_HEADER_BYTES == 4096
    assert HEADER_BYTES == 72
    assert layout.VERSION == 1
    assert f"at most {_DELETED_AT_ONCE} keys a transaction" in TEXT
    assert f"up to {_MOST_ROOM_AHEAD >> 20} MiB longer" in TEXT
    assert f"but for {_TAIL >> 10} KiB" in TEXT
    assert f"the last {_RESERVE >> 10} KiB" in TEXT


def test_newer_versions_are_refused() -> None:
    from expbuf_core.errors import FormatVersionError

    path = Path("log.mdb")
    newer = layout._sealed(layout._HEADER.pack(b"EXPBUFM1", 2, bytes(16), SALT))
    with pytest.raises(FormatVersionError):
        layout.decode_header(newer, path, bytes(16))
    newer = layout._sealed(
        layout._STAGE_HEADER.pack(b"EXPBUFS1", 2, bytes(16), SALT, 1, 0, 0, 1 << 20)
    )
    with pytest.raises(FormatVersionError):
        layout.decode_stage_header(newer, path)
