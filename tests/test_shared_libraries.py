"""What shared libraries need and bring: read from files, never loaded."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from expbuf_core import doctor, shared_libraries
from expbuf_core.shared_libraries import cuda_libraries_missing, needed_by, openmp_runtimes


def elf(*needed: str) -> bytes:
    """A 64-bit ELF file that asks for these libraries and holds nothing else."""
    strings, at = b"\0", []
    for name in needed:
        at.append(len(strings))
        strings += name.encode() + b"\0"
    table, base = 64 + 2 * 56, 0x10000
    entries = [(1, offset) for offset in at]
    begin = table + 16 * (len(entries) + 2)
    entries += [(5, base + begin), (0, 0)]
    dynamic = b"".join(struct.pack("<qQ", *entry) for entry in entries)
    end = begin + len(strings)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 64, 0, 0
    )
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, end, end, 4096)
    place = struct.pack("<IIQQQQQQ", 2, 6, table, base + table, 0, len(dynamic), len(dynamic), 8)
    return header + load + place + dynamic + strings


def test_what_a_file_needs(tmp_path: Path) -> None:
    path = tmp_path / "module.so"
    path.write_bytes(elf("libcudart.so.12", "libc.so.6"))
    assert needed_by(path) == ["libcudart.so.12", "libc.so.6"]


def test_a_real_module() -> None:
    import numpy._core._multiarray_umath as module

    assert any(name.startswith("libc.so") for name in needed_by(Path(module.__file__)))


@pytest.mark.parametrize(
    "content",
    [b"", b"#!/bin/sh\n", elf("libc.so.6")[:100], b"\x7fELF\x01\x01" + elf("x")[6:], b"\0" * 64],
)
def test_other_and_damaged_files_need_nothing(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "module.so"
    path.write_bytes(content)
    assert needed_by(path) == []
    assert needed_by(tmp_path / "none.so") == []


@pytest.fixture
def gpu_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution faiss-gpu-none whose module needs CUDA; the folder it is installed in."""
    (tmp_path / "faiss").mkdir()
    needed = ("libcuda.so.1", "libcublas.so.999", "libnvidia-none.so.999", "libc.so.6")
    (tmp_path / "faiss" / "_swigfaiss.so").write_bytes(elf(*needed))
    info = tmp_path / "faiss_gpu_none-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faiss-gpu-none\nVersion: 1\n")
    (info / "RECORD").write_text("faiss/_swigfaiss.so,,\n")
    (tmp_path / "faiss_gpu_none.libs").mkdir()
    (tmp_path / "faiss_gpu_none.libs" / "libiomp5-1a2b.so").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_missing_libraries_of_cuda(gpu_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver is a matter of its own."""
    assert cuda_libraries_missing("faiss-gpu-none") == ["libcublas.so.999"]
    monkeypatch.setattr(doctor, "packages_distributions", lambda: {"faiss": ["faiss-gpu-none"]})
    problems = [f for f in doctor.examine() if (f.topic, f.level) == ("cuda", "problem")]
    assert len(problems) == 1
    assert "faiss-gpu-none needs libcublas.so.999" in problems[0].message
    folder = gpu_wheel / "nvidia" / "cublas" / "lib"
    folder.mkdir(parents=True)
    (folder / "libcublas.so.999").touch()
    assert cuda_libraries_missing("faiss-gpu-none") == []


def test_runtimes_of_openmp(gpu_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "faiss_gpu_none" in openmp_runtimes()["libiomp5"]
    monkeypatch.setattr(sys, "path", [str(gpu_wheel)])
    assert openmp_runtimes() == {"libiomp5": ["faiss_gpu_none"]}
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("KMP_DUPLICATE_LIB_OK", raising=False)
    found = [f for f in doctor.examine() if f.topic == "openmp"]
    assert [(f.level, f.message) for f in found] == [("ok", "libiomp5 comes with faiss_gpu_none")]
    two = {"libgomp": ["a"], "libiomp5": ["b", "c"]}
    monkeypatch.setattr(shared_libraries, "openmp_runtimes", lambda: two)
    (warning,) = (f for f in doctor.examine() if f.topic == "openmp")
    assert warning.level == "warning"
    assert "libgomp comes with a; libiomp5 comes with b, c" in warning.message
