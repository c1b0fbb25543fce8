"""FORMAT.md says what the code does: tables, columns, words and the example are compared."""

from __future__ import annotations

import importlib
import re
import struct
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from expbuf_core import codec, control, frames
from expbuf_core.commit import draft_rows
from expbuf_core.contracts import Stamped
from expbuf_core.state import COLUMNS
from expbuf_file import layout

TEXT = (Path(__file__).parents[1] / "FORMAT.md").read_text(encoding="utf-8")
TYPES = {
    "u16": "H",
    "u32": "I",
    "u64": "Q",
    "i64": "q",
    "8 bytes": "8s",
    "16 bytes": "16s",
    "zeros": "4x",
}
COLUMN_TYPES = {
    "i64": np.int64,
    "i32": np.int32,
    "u32": np.uint32,
    "u8": np.uint8,
    "f64": np.float64,
    "f32": np.float32,
    "bool": np.bool_,
}


def table_behind(mark: str) -> list[list[str]]:
    """Cells of the table behind a comment, without its head."""
    _, found, rest = TEXT.partition(f"<!-- {mark} -->\n")
    assert found, mark
    lines = rest.split("\n\n", 1)[0].splitlines()[2:]
    return [[c.strip() for c in re.split(r"(?<!\\)\|", line.strip())[1:-1]] for line in lines]


@pytest.mark.parametrize("name", re.findall(r"<!-- struct: ([\w.]+) -->", TEXT))
def test_structures(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    wanted: struct.Struct = getattr(importlib.import_module(module), attribute)
    layout_of = "<"
    for offset, size, kind, *_ in table_behind(f"struct: {name}"):
        assert struct.calcsize(layout_of) == int(offset)
        layout_of += TYPES[kind]
        assert struct.calcsize(layout_of) == int(offset) + int(size)
    assert layout_of == wanted.format


def test_every_structure_is_there() -> None:
    wanted = {
        "expbuf_file.layout._HEADER",
        "expbuf_file.layout.BEGIN_BODY",
        "expbuf_file.layout.END_BODY",
        "expbuf_core.frames.HEADER",
        "expbuf_core.frames.ROW",
        "expbuf_core.codec._CONTENT",
        "expbuf_core.codec._ADD",
        "expbuf_core.codec._OUTCOME",
        "expbuf_core.codec._RELOG",
        "expbuf_core.codec._REEMBED",
        "expbuf_core.snapshots._HEADER",
        "expbuf_core.segments._HEADER",
    }
    assert wanted == set(re.findall(r"<!-- struct: ([\w.]+) -->", TEXT))
    assert layout.HEADER_BYTES == 4096
    assert frames.HEADER_BYTES == 72
    assert layout.END_BYTES == 80
    assert layout.OFFSET_BITS == 40


def test_columns_of_a_snapshot() -> None:
    found = {name.strip("`"): COLUMN_TYPES[kind] for name, kind, _ in table_behind("columns")}
    assert list(found.items()) == list(COLUMNS.items())


def test_columns_of_a_relog() -> None:
    found = {
        name.strip("`"): COLUMN_TYPES[kind.split(",")[0]] for name, kind in table_behind("relog")
    }
    assert list(found.items()) == list(codec.RELOG_COLUMNS.items())


def test_words_of_the_control_page() -> None:
    found = {}
    for number, name, *_ in table_behind("words"):
        found[name] = int(re.match(r"\d+", number)[0])  # type: ignore[index]
    words = {
        name: value
        for name, value in vars(control).items()
        if name.isupper()
        and not name.startswith("_")
        and name not in ("WORDS", "PAGE_BYTES", "POSTPONED")
    }
    assert found == words


def test_kinds() -> None:
    for number, name in codec.KIND_NAMES.items():
        assert f"\n| {number} | {name.upper()} |" in TEXT
    assert f"**LOG_BEGIN** (kind {frames.LOG_BEGIN:#04X})".replace("0X", "0x") in TEXT
    assert f"**LOG_END** (kind {frames.LOG_END:#04X})".replace("0X", "0x") in TEXT


def example() -> tuple[int, bytes]:
    """Offset and bytes of the example in the document."""
    _, _, rest = TEXT.partition("<!-- example -->\n```text\n")
    lines = rest.partition("```")[0].splitlines()
    raw = bytes.fromhex("".join(line[8:] for line in lines))
    return int(lines[0][:6], 16), raw


SALT = bytes(range(16))


def test_the_example_is_what_is_written() -> None:
    offset, documented = example()
    row = codec.encode_row(
        np.array([1.0], np.float32), np.array([0.5], np.float32), {"answer": "7"}
    )
    body = codec.encode_add(
        codec.AddBody(
            timestamp=np.array([1.7e9]),
            reward=np.array([np.nan]),
            confidence=np.array([0.75], np.float32),
            priority=np.array([0.1], np.float32),
            vectors=np.array([[0.6, 0.8]], np.float32),
            labels=None,
        )
    )
    draft = draft_rows(codec.ADD, body, bytearray(row), np.array([len(row)], np.uint32))
    assert draft.rows is not None
    seals = frames.stamp_rows(draft.rows, draft.operation.lengths, draft.content_crcs, 41)
    operation = draft.operation._replace(rows=draft.rows, row_crcs=seals)
    data, index, data_bytes, index_bytes = frames.encode(
        Stamped(7, 41, operation), salt=SALT, epoch=1, durable_before=6, data_offset=offset
    )
    written = b"".join(map(bytes, data))
    assert written == documented
    assert len(written) == data_bytes == 192
    assert b"".join(map(bytes, index)) == documented[:index_bytes]
    assert index_bytes == 128


def test_the_example_reads_as_it_is_explained() -> None:
    offset, raw = example()
    header = frames.decode_header(raw, 0, crc32(SALT))
    assert header is not None
    assert (header.lsn, header.durable_before, header.first_id) == (7, 6, 41)
    assert (header.epoch, header.kind, header.data_offset) == (1, codec.ADD, offset)
    assert header.rows_offset == 0x10E0
    table = frames.decode_table(raw, header, 0)
    assert table is not None
    assert frames.check_rows(raw, header.rows_offset - offset, 41, table) is None
    row = raw[header.rows_offset - offset :][: header.rows_len]
    decoded = codec.decode_row(row)
    assert decoded.fields == {"answer": "7"}
    assert (decoded.v_embed.tolist(), decoded.q_embed.tolist()) == ([1.0], [0.5])
    body = codec.decode_add(raw[frames.HEADER_BYTES :][: header.body_len])
    assert body.vectors.tolist() == np.array([[0.6, 0.8]], np.float32).tolist()
    # The explanation names every field once, in order, where it stands.
    for line in TEXT.partition("| offset | bytes | what |")[2].split("\n\n")[0].splitlines()[2:]:
        at, shown, _ = [cell.strip() for cell in line.strip().strip("|").split("|")]
        first = re.match(r"`((?:[0-9a-f]{2} ?)+)", shown)
        assert first, line
        wanted = bytes.fromhex(first[1])
        start = int(at, 16) - offset
        assert raw[start : start + len(wanted)] == wanted, line


def test_stored_sizes(tmp_path: Path) -> None:
    """A file that is made today has the sizes that the document states."""
    header = layout.FileHeader(0, 1, 1 << 20, bytes(16), SALT, layout.BORN_IN_USE)
    page = layout.encode_header(header)
    assert len(page) == 4096
    assert page[:8] == b"EXPBUFL1"
    assert int.from_bytes(page[72:76], "little") == crc32(page[:72])
    assert not page[76:].strip(b"\0")
