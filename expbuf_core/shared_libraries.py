"""Which shared libraries installed distributions bring and need; nothing is imported or run."""

from __future__ import annotations

import ctypes
import mmap
import re
import struct
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

_HEADER = struct.Struct("<16s8x8xQ8x4x2xHH")  # of ELF64: e_phoff, e_phentsize, e_phnum
_SEGMENT = struct.Struct("<I4xQQ8xQ")  # p_type, p_offset, p_vaddr, p_filesz
_ENTRY = struct.Struct("<qQ")
_LOAD, _DYNAMIC = 1, 2
_NEEDED, _STRINGS = 1, 5
_CUDA = re.compile(r"lib(?!cuda\.)(cu|nv)\w*\.so")  # not the driver, which is no library of CUDA
_OPENMP = re.compile(r"lib(gomp|iomp5|omp)(?:-[0-9a-f]+)?\.so")


def needed_by(path: Path) -> list[str]:
    """Names of the libraries that a 64-bit ELF file asks the loader for; none for other files."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return list(_needed(data))
    except (OSError, ValueError, struct.error, IndexError):
        return []


def _needed(data: mmap.mmap) -> Iterator[str]:
    magic, table, size, count = _HEADER.unpack_from(data)
    if magic[:6] != b"\x7fELF\x02\x01":
        return
    segments = [_SEGMENT.unpack_from(data, table + i * size) for i in range(count)]
    entries = [
        _ENTRY.unpack_from(data, at)
        for kind, offset, _, length in segments
        if kind == _DYNAMIC
        for at in range(offset, offset + length, _ENTRY.size)
    ]
    (strings,) = (value for tag, value in entries if tag == _STRINGS)
    (start,) = (
        strings - address + offset
        for kind, offset, address, length in segments
        if kind == _LOAD and address <= strings < address + length
    )
    for tag, value in entries:
        if tag == _NEEDED:
            end = data.find(b"\0", start + value)
            yield data[start + value : end].decode()


def cuda_libraries_missing(distribution: str) -> list[str]:
    """Libraries of CUDA that the distribution's modules need, and the loader would not find."""
    try:
        listed = files(distribution) or ()
    except PackageNotFoundError:
        return []
    modules = [Path(str(file.locate())) for file in listed if file.suffix == ".so"]
    wanted = {name for module in modules for name in needed_by(module) if _CUDA.match(name)}
    return sorted(name for name in wanted if not _is_found(name, modules))


def _is_found(name: str, modules: list[Path]) -> bool:
    # NVIDIA's own wheels put them beside the module's package, where it looks for itself.
    for site in {module.parent.parent for module in modules}:
        if any(site.glob(f"nvidia/*/lib/{name}")):
            return True
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def openmp_runtimes() -> dict[str, list[str]]:
    """OpenMP runtimes that installed packages bring along, and which ones do."""
    found: dict[str, set[str]] = {}
    for site in map(Path, dict.fromkeys(sys.path)):
        for pattern in ("*.libs/lib*omp*.so*", "*/lib/lib*omp*.so*"):
            for path in site.glob(pattern):
                match = _OPENMP.match(path.name)
                if match is not None:
                    owner = path.relative_to(site).parts[0].removesuffix(".libs")
                    found.setdefault(f"lib{match[1]}", set()).add(owner)
    return {runtime: sorted(owners) for runtime, owners in sorted(found.items())}
