"""`expbuf report`: one page that shows a buffer, runs nothing of its content, and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expbuf_core import Experience, ExperienceBuffer
from expbuf_core.codec import OutcomeBody, encode_outcome
from expbuf_core.commit import Draft
from expbuf_core.errors import ConfigError, StorageError
from expbuf_core.report import write_report
from expbuf_core.report.charts import round_above
from expbuf_core.report.embedding_map import embedding_map
from expbuf_core.report.gather import bounds
from expbuf_core.report.thumbnails import MOST_BYTES, png, thumbnail

DIM = 16
SECTIONS = ["map", "distributions", "time", "experiences", "health"]
NASTY = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> \"'&lt;"
VOID = {"meta", "img", "input", "br", "rect", "hr", "link"}


class Page(HTMLParser):
    """A page taken apart: which elements it has, and the text of each kind."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._shown: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)
            if self._open[-1] not in ("script", "style"):
                self._shown.append(data)

    def words(self) -> str:
        """All that is shown as text."""
        return " ".join(" ".join(self._shown).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def data(self) -> Any:
        """What the script is given."""
        return json.loads(self.texts["script"][0])


def experiences(n: int, *, seed: int = 0, **fields: Any) -> list[Experience]:
    rng = np.random.default_rng(seed)
    v = rng.standard_normal((n, DIM), dtype=np.float32)
    return [
        Experience(v_embed=v[i], question=f"question {i}", answer=str(i % 3), **fields)
        for i in range(n)
    ]


def make(folder: Path, items: Sequence[Experience]) -> ExperienceBuffer:
    buffer = ExperienceBuffer.open(folder, index="exact", durability="os", seed=0)
    if items:
        buffer.add_many(items)
    return buffer


def report(folder: Path, **options: Any) -> Page:
    target = folder.parent / "report.html"
    assert write_report(folder, target, **options) == target
    return Page(target.read_text(encoding="utf-8"))


def ranked(page: Page) -> list[int]:
    """Ids in the rankings, from the first to the last."""
    return [int(button["data-id"] or -1) for button in page.named("button") if "data-id" in button]


# ---------------------------------------------------------------- the page


def test_a_page_has_all_its_parts(tmp_path: Path) -> None:
    with make(tmp_path / "memory", experiences(30, confidence=0.7, rewards=0.5)) as buffer:
        found = buffer.search_index(v_embed=buffer.get(3).v_embed, k=4)
        buffer.record_outcome(found.receipt, success=True)
    page = report(tmp_path / "memory")
    assert [section["id"] for section in page.named("section")] == SECTIONS
    words = page.words()
    for part in ("Priority", "Success rate", "Age", "Reward", "Most useful", "Healthy"):
        assert part in words, part
    assert "4 uses with an outcome" in words
    assert "question 3" in words
    assert page.data()["n"] == 30


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_few_experiences_are_enough(tmp_path: Path, count: int) -> None:
    make(tmp_path / "memory", experiences(count)).close()
    assert report(tmp_path / "memory").data()["n"] == count


def test_an_empty_buffer_says_how_to_begin(tmp_path: Path) -> None:
    make(tmp_path / "memory", []).close()
    page = report(tmp_path / "memory")
    assert page.named("body") == [{"class": "empty"}]
    assert "record_outcome" in page.words()
    assert page.data() is None


def test_without_outcomes_and_rewards_it_says_so(tmp_path: Path) -> None:
    make(tmp_path / "memory", experiences(8)).close()
    words = report(tmp_path / "memory").words()
    assert "No outcome has been recorded yet" in words
    assert "None of the 8 is known yet" in words
    assert "None has been retrieved yet" in words


def test_it_is_the_same_page_again(tmp_path: Path) -> None:
    make(tmp_path / "memory", experiences(200)).close()
    first, second = (report(tmp_path / "memory", points=60).data() for _ in range(2))
    assert first["id"] == second["id"]
    assert first["maps"] == second["maps"]


def test_a_sample_is_called_one(tmp_path: Path) -> None:
    make(tmp_path / "memory", experiences(300)).close()
    page = report(tmp_path / "memory", points=50)
    shown = page.data()["n"]
    assert 50 <= shown <= 50 + 24  # those of the rankings are always there
    assert f"A sample: {shown} of 300 experiences" in page.words()
    known = np.frombuffer(base64.b64decode(page.data()["id"]), "<f8")
    listed = {
        int(button["data-id"] or -1) for button in page.named("button") if "data-id" in button
    }
    assert listed
    assert listed <= set(known.astype(int).tolist())


# ---------------------------------------------------------------- nothing runs, nothing is loaded


def test_what_users_store_is_text_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "<b>me&mory\"'"
    nasty = {
        "question": NASTY + "\x00\x1b[31m\u202e\ud800",
        "answer": {"</script>": [NASTY, np.zeros(3), b"bytes"]},
        "tags": (NASTY,),
        "key": NASTY,
        "image": "/pictures/" + NASTY,
        "metadata": {"thumbnail": NASTY},
    }
    items = experiences(3)
    plain = {name: getattr(items[0], name) for name in ("v_embed", "confidence")}
    make(folder, [Experience(**plain, **nasty), *items[1:]]).close()
    page = report(folder)
    kinds = {tag for tag, _ in page.elements}
    assert "b" in kinds  # the page's own: ids are bold
    assert not page.named("img")
    assert len(page.named("script")) == 2
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
    assert NASTY in page.words()
    assert any(NASTY in text for text in page.data()["strings"])
    assert "\x1b" not in "".join(page.texts["span"])


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4), np.uint8)
    items = experiences(5, metadata={"thumbnail": pixels}, image="https://example.org/a.png")
    make(tmp_path / "memory", items).close()
    page = report(tmp_path / "memory")
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
        for name in ("src", "srcset", "poster", "data", "action", "background"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
        assert (attributes.get("href") or "#").startswith("#")
    style = "".join(page.texts["style"])
    assert "url(" not in style
    assert "@import" not in style
    script = page.texts["script"][-1]
    for call in ("fetch(", "XMLHttpRequest", "import(", "innerHTML", "eval(", "http"):
        assert call not in script, call


def test_the_policy_allows_the_pages_own_script_alone(tmp_path: Path) -> None:
    make(tmp_path / "memory", []).close()
    page = report(tmp_path / "memory")
    (policy,) = [
        meta["content"] or ""
        for meta in page.named("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    ]
    checksum = base64.b64encode(hashlib.sha256(page.texts["script"][-1].encode()).digest())
    assert f"script-src 'sha256-{checksum.decode()}';" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")


# ---------------------------------------------------------------- reading


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_is_only_read(tmp_path: Path) -> None:
    make(tmp_path / "memory", experiences(20)).close()
    before = contents(tmp_path / "memory")
    report(tmp_path / "memory")
    assert contents(tmp_path / "memory") == before


def test_a_writer_goes_on(tmp_path: Path) -> None:
    with make(tmp_path / "memory", experiences(20)) as buffer:
        assert report(tmp_path / "memory").data()["n"] == 20
        buffer.add_many(experiences(5, seed=1))
        assert report(tmp_path / "memory").data()["n"] == 25


def test_a_damaged_payload_is_told_and_the_rest_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    with make(folder, experiences(6, metadata={"note": "find me here"})) as buffer:
        buffer.rebuild_index()
        buffer.save_snapshot()  # so that opening does not read the payloads
    (log,) = [path for path in folder.glob("experience_data.*") if b"find me" in path.read_bytes()]
    raw = bytearray(log.read_bytes())
    raw[raw.index(b"find me here") + 3] ^= 1
    log.write_bytes(raw)
    page = report(folder)
    assert page.data()["n"] == 6
    assert "Something is wrong" in page.words()
    assert "the payload is damaged" in page.data()["strings"]


@pytest.mark.parametrize(
    ("pattern", "told"),
    [("*.vectors", "was not opened"), ("manifest.json", "checksum mismatch")],
)
def test_a_damaged_index_is_a_remark(tmp_path: Path, pattern: str, told: str) -> None:
    folder = tmp_path / "memory"
    with make(folder, experiences(20)) as buffer:
        buffer.rebuild_index()
    (path,) = (folder / "index").rglob(pattern)
    raw = bytearray(path.read_bytes())
    if path.suffix == ".json":
        raw = raw.replace(b'"lsn": ', b'"lsn": 1')
    else:
        raw[-5] ^= 1
    path.write_bytes(raw)
    page = report(folder)
    assert "Healthy, with a remark" in page.words()
    assert told in page.words()
    assert page.data()["n"] == 20


def test_no_buffer_no_page(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        write_report(tmp_path / "nowhere", tmp_path / "report.html")
    make(tmp_path / "memory", []).close()
    with pytest.raises(StorageError, match="cannot write the report"):
        write_report(tmp_path / "memory", tmp_path / "missing" / "report.html")
    with pytest.raises(ConfigError, match="points"):
        write_report(tmp_path / "memory", tmp_path / "report.html", points=0)
    with pytest.raises(ConfigError, match="elsewhere"):
        write_report(tmp_path / "memory", tmp_path / "memory" / "report.html")
    assert not (tmp_path / "report.html").exists()


# ---------------------------------------------------------------- what is shown


def test_many_good_outcomes_are_worth_more_than_one(tmp_path: Path) -> None:
    with make(tmp_path / "memory", experiences(40)) as buffer:
        for i in range(50):
            buffer.record_outcome([7], success=i % 5 != 0)  # 40 of 50
        buffer.record_outcome([8], success=True)  # 1 of 1
        for _ in range(10):
            buffer.record_outcome([9], success=False)
        buffer.record_outcome([10], success=False)
    page = report(tmp_path / "memory")
    assert ranked(page)[:4] == [7, 8, 9, 10]  # most useful, then least useful


def test_bounds_hold_what_was_seen_and_narrow_with_evidence() -> None:
    tries = np.array([1.0, 10.0, 1000.0])
    low, high = bounds(tries / 2, tries)
    assert (low < 0.5).all()
    assert (high > 0.5).all()
    assert (np.diff(high - low) < 0).all()
    low, high = bounds(np.array([0.0, 4.0]), np.array([4.0, 4.0]))
    assert low[0] == pytest.approx(0)
    assert high[1] == pytest.approx(1)


def test_outcomes_come_from_the_log_and_count_once(tmp_path: Path) -> None:
    with make(tmp_path / "memory", experiences(10)) as buffer:
        for i in range(6):
            found = buffer.search_index(v_embed=buffer.get(i).v_embed, k=2)
            buffer.record_outcome(found.receipt, success=i < 4)
        # Two processes may log one receipt at the same moment: the second counts nothing.
        again = OutcomeBody(
            bytes.fromhex(found.receipt.token),
            found.receipt.lsn,
            True,
            np.array(found.receipt.ids, np.int64),
            np.ones(len(found), np.float32),
        )
        buffer._live().commit(Draft(encode_outcome(again), weight=0))
    words = report(tmp_path / "memory").words()
    assert "6 searches in the log" in words
    assert "67% were right" in words


def test_a_long_log_is_looked_through_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expbuf_core.report.gather._MOST_OPERATIONS", 5)
    with make(tmp_path / "memory", experiences(10)) as buffer:
        for i in range(20):
            buffer.record_outcome([i % 10], success=True)
        lsn = buffer.lsn
    words = report(tmp_path / "memory").words()
    assert f"5 searches in the log since operation {lsn - 4}" in words
    assert "20 uses with an outcome" in words


def test_a_log_that_was_dropped_is_not_made_up(tmp_path: Path) -> None:
    with make(tmp_path / "memory", experiences(10)) as buffer:
        buffer.record_outcome([1, 2], success=True)
        for i in range(3):  # the log before the older of two snapshots goes
            buffer.update_priorities([i], [1.0])
            buffer.save_snapshot()
    page = report(tmp_path / "memory")
    assert "The log has none since operation" in page.words()
    assert "2 uses with an outcome" in page.words()  # the counts stand


# ---------------------------------------------------------------- parts


def decoded(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pixels of a PNG without filters."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, parts = 8, {}
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        name, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        (crc,) = struct.unpack_from(">I", data, at + 8 + size)
        assert crc == zlib.crc32(name + body)
        parts[name] = body
        at += 12 + size
    width, height, depth, colours = struct.unpack_from(">IIBB", parts[b"IHDR"])
    assert depth == 8
    channels = {0: 1, 2: 3, 6: 4}[colours]
    lines = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, channels)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_survive_their_png(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    assert (decoded(png(pixels)) == pixels).all()


def test_thumbnails_follow_the_convention() -> None:
    def of(**fields: Any) -> str | None:
        return thumbnail(Experience(**fields))

    pixels = np.zeros((8, 8), np.uint8)
    encoded = png(pixels[:, :, None])
    address = "data:image/png;base64," + base64.b64encode(encoded).decode()
    assert of(metadata={"thumbnail": pixels}) == address
    assert of(metadata={"thumbnail": encoded}) == address
    assert of(image=encoded) == address
    assert of(image=b"\xff\xd8\xff\xe0 jpeg") == "data:image/jpeg;base64,/9j/4CBqcGVn"
    assert (of(image=b"RIFF\0\0\0\0WEBPVP8 ") or "").startswith("data:image/webp;")
    for bad in (
        pixels.astype(np.float32),
        np.zeros((8, 8, 2), np.uint8),
        np.zeros((0, 8), np.uint8),
        b"<svg onload=alert(1)>",
        encoded.ljust(MOST_BYTES + 1, b"\0"),
        "a.png",
        None,
    ):
        assert of(metadata={"thumbnail": bad}) is None
    assert of(image="a.png") is None
    large = of(metadata={"thumbnail": np.zeros((1000, 300, 3), np.uint8)})
    assert large is not None
    shape = decoded(base64.b64decode(large.partition(",")[2])).shape
    assert max(shape) <= 96


def test_neighbours_stay_together_on_the_map() -> None:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((6, 64)) * 3
    group = np.repeat(np.arange(6), 40)
    points = (centres[group] + rng.standard_normal((240, 64)) * 0.3).astype(np.float32)
    found = embedding_map(points)
    for xy in (found.neighbourhoods, found.projection):
        assert xy.shape == (240, 2)
        assert (xy >= 0).all()
        assert (xy <= 1).all()
    distances = np.square(found.neighbourhoods[:, None] - found.neighbourhoods[None]).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (group[distances.argmin(axis=1)] == group).mean() > 0.98
    assert 0 < found.explained < 1


@pytest.mark.parametrize("shape", [(1, 3), (2, 3), (3, 1), (5, 2), (40, 1)])
def test_small_and_flat_maps(shape: tuple[int, int]) -> None:
    points = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for given in (points, np.zeros(shape, np.float32)):
        found = embedding_map(given)
        assert np.isfinite(found.neighbourhoods).all()
        assert np.isfinite(found.projection).all()


def test_points_that_are_no_landmarks_lie_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expbuf_core.report.embedding_map._LANDMARKS", 150)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((3, 16)) * 5
    group = rng.integers(0, 3, 900)
    points = (centres[group] + rng.standard_normal((900, 16)) * 0.2).astype(np.float32)
    found = embedding_map(points)
    assert found.landmarks == 150
    middles = np.stack([found.neighbourhoods[group == i].mean(axis=0) for i in range(3)])
    near = np.square(found.neighbourhoods[:, None] - middles[None]).sum(axis=2).argmin(axis=1)
    assert (near == group).mean() > 0.98


@pytest.mark.parametrize(
    ("value", "wanted"), [(0, 1), (0.07, 0.08), (1, 1), (3.2, 4), (11, 20), (99, 100), (870, 1000)]
)
def test_axes_end_at_round_numbers(value: float, wanted: float) -> None:
    assert round_above(value) == pytest.approx(wanted)


# ---------------------------------------------------------------- large, and in a browser


@pytest.mark.long
def test_a_hundred_thousand(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    n = 100_000
    with ExperienceBuffer.open(
        tmp_path / "memory", max_size=n, index="exact", durability="os"
    ) as buffer:
        for _ in range(100):
            v = rng.standard_normal((n // 100, 64), dtype=np.float32)
            buffer.add_many({"v_embed": v, "question": ["which?"] * len(v)})
    target = tmp_path / "report.html"
    write_report(tmp_path / "memory", target)
    assert "of 100,000 experiences" in target.read_text(encoding="utf-8")
    assert target.stat().st_size < 10 << 20


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.mark.skipif(browser() is None, reason="no Chromium is installed")
def test_a_browser_draws_it_and_runs_nothing_else(tmp_path: Path) -> None:
    items = [
        Experience(v_embed=one.v_embed, question=NASTY, answer=NASTY) for one in experiences(30)
    ]
    with make(tmp_path / "memory", items) as buffer:
        buffer.record_outcome([1, 2], success=True)
    target = write_report(tmp_path / "memory", tmp_path / "report.html")
    command = [
        browser() or "",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
    ]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    command += ["--virtual-time-budget=3000", "--dump-dom", target.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not told
    legend = re.search(r'<div id="legend">(.*?)</div>\s*<fieldset', done.stdout, re.DOTALL)
    assert legend
    assert "never retrieved (28)" in legend[1]
    assert "<title>memory · experience buffer</title>" in done.stdout  # not renamed by a question
