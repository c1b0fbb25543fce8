"""`expbuf doctor`: what on this machine, or in this folder, may be in the way. Changes nothing.

It looks at what is installed without importing any of it; a plugin that is broken is a finding.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Literal, NamedTuple

from expbuf_core import folder as folders
from expbuf_core import shared_libraries
from expbuf_core.config_schema import BufferConfig, load_config
from expbuf_core.errors import ConfigError, ExpbufError, PluginError
from expbuf_core.locks import opener
from expbuf_core.native import native, why_not
from expbuf_core.plugins import KINDS, PluginRegistry, default_registry
from expbuf_core.transfer import NOTE

_DEPENDENCIES = ("expbuf-core", "numpy", "pluggy", "pydantic", "PyYAML")
_MEMORY = {"tmpfs", "ramfs"}
_LAYERED = {"overlay", "aufs", "fuse-overlayfs", "fuse.fuse-overlayfs"}
_SYNCS = 30
_SYNCED_BYTES = 4096
_TOO_FAST_S = 20e-6
_SLOW_S = 20e-3
_LITTLE_ROOM = 1 << 30


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        topic: What.
        level: "ok"; "note", worth knowing; "warning", may be in the way; "problem", is.
        message: What was found.
        advice: What to do about it; "" for nothing.
    """

    topic: str
    level: Literal["ok", "note", "warning", "problem"]
    message: str
    advice: str = ""


def examine(
    folder: str | os.PathLike[str] | None = None,
    config: str | os.PathLike[str] | None = None,
) -> Iterator[Finding]:
    """Look at this installation, and at a folder and a configuration, if they are named.

    Args:
        folder: Of a buffer, or where one is to be made. A file is written there, synced some
            times, and removed; a folder that does not exist is not made.
        config: A YAML file.
    """
    registry = default_registry()
    yield from _versions()
    yield from _plugins(registry)
    yield from _faiss()
    yield from _threads()
    if config is not None:
        yield from _configuration(config, registry)
    if folder is not None:
        yield from _folder(Path(folder), registry)


# ---------------------------------------------------------------- the installation


def _versions() -> Iterator[Finding]:
    found = [f"Python {platform.python_version()}"]
    for name in _DEPENDENCIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} (not installed as a distribution)")
    yield Finding("versions", "ok", ", ".join(found))
    if sys.platform != "linux":
        advice = "run it in a Linux container or machine"
        yield Finding("platform", "warning", f"{sys.platform} is not supported", advice)
    if native is None:
        advice = (
            "unset EXPBUF_NATIVE"
            if why_not == "EXPBUF_NATIVE=0"
            else "install expbuf-core again where there is a C compiler; pip -v says what it meets"
        )
        yield Finding("native code", "note", f"not there, adds take longer: {why_not}", advice)
    else:
        yield Finding("native code", "ok", "does the path of plain adds")


def _plugins(registry: PluginRegistry) -> Iterator[Finding]:
    for plugin in registry.plugins():
        name = f"{plugin.name} ({plugin.distribution} {plugin.version})"
        offers = [f"{p.kind}:{p.name}" for p in plugin.providers]
        if plugin.events:
            offers.append(f"{len(plugin.events)} events")
        if plugin.status == "disabled":
            advice = "unset EXPBUF_DISABLE_PLUGINS to have it"
            yield Finding("plugin", "note", f"{name} is disabled", advice)
        elif plugin.status != "ok":
            advice = "install a version that fits, or remove it"
            yield Finding("plugin", "problem", f"{name} {plugin.status}: {plugin.error}", advice)
        else:
            yield Finding("plugin", "ok", f"{name}: {', '.join(offers) or 'nothing'}")
        for provider in plugin.providers:
            if provider.error is not None:
                message = f"{provider.kind} {provider.name!r} cannot be selected: {provider.error}"
                yield Finding("plugin", "problem", message)


def _faiss() -> Iterator[Finding]:
    wheels = sorted(set(packages_distributions().get("faiss", [])))
    if len(wheels) > 1:
        yield Finding(
            "faiss",
            "problem",
            f"{' and '.join(wheels)} are installed; they share one folder, and each has overwritten"
            " files of the other",
            f"pip uninstall -y {' '.join(wheels)}, then install one of them again",
        )
    elif wheels:
        yield Finding("faiss", "ok", f"{wheels[0]} {version(wheels[0])}")
    else:
        yield Finding("faiss", "note", "no FAISS is installed; searches are exact")
    if any("gpu" in wheel for wheel in wheels):
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError as exc:
            advice = "install the NVIDIA driver, or in a container its runtime; or use faiss-cpu"
            message = f"the NVIDIA driver cannot be loaded ({exc}); the index runs on the CPU"
            yield Finding("cuda", "warning", message, advice)
        else:
            yield Finding("cuda", "ok", "the NVIDIA driver is there")
    for wheel in wheels:
        missing = shared_libraries.cuda_libraries_missing(wheel)
        if missing:
            message = f"{wheel} needs {', '.join(missing)}, which cannot be found; it will not load"
            advice = "install NVIDIA's CUDA packages of that version, or use faiss-cpu"
            yield Finding("cuda", "problem", message, advice)


def _threads() -> Iterator[Finding]:
    method = (
        multiprocessing.get_start_method(allow_none=True)
        or multiprocessing.get_context(None).get_start_method()
    )
    if method == "fork":
        message = (
            "multiprocessing forks: a buffer opens itself again in the child, but threads do not "
            "survive, those of OpenMP (torch, numpy's BLAS) neither"
        )
        advice = "where a child hangs: multiprocessing.set_start_method('spawn')"
        yield Finding("fork", "note", message, advice)
    else:
        yield Finding("fork", "ok", f"multiprocessing uses {method!r}")
    if os.environ.get("KMP_DUPLICATE_LIB_OK"):
        message = (
            "KMP_DUPLICATE_LIB_OK is set: two OpenMP runtimes in one process may give wrong results"
        )
        yield Finding(
            "openmp", "warning", message, "unset it, and install one build of each library"
        )
    runtimes = shared_libraries.openmp_runtimes()
    text = "; ".join(f"{name} comes with {', '.join(who)}" for name, who in runtimes.items())
    threads = os.environ.get("OMP_NUM_THREADS")
    text = "; ".join(filter(None, [text, f"OMP_NUM_THREADS={threads}" if threads else ""]))
    if len(runtimes) > 1:
        message = (
            f"several OpenMP runtimes are installed ({text}); in one process each starts threads "
            "for all cores, and a fork after that may hang"
        )
        advice = "set OMP_NUM_THREADS, and start children by spawn"
        yield Finding("openmp", "warning", message, advice)
    elif text:
        yield Finding("openmp", "ok", text)


# ---------------------------------------------------------------- a configuration


def _configuration(config: str | os.PathLike[str], registry: PluginRegistry) -> Iterator[Finding]:
    try:
        settings = load_config(config, registry=registry)
    except ConfigError as exc:
        yield Finding("configuration", "problem", str(exc))
        return
    yield Finding("configuration", "ok", f"{os.fspath(config)}: every key is known and in bounds")
    for section in settings.skipped:
        yield Finding(
            "configuration",
            "warning",
            f"the section {section} is skipped: no such backend is installed",
            "install its plugin (see `expbuf plugins`), or remove the section",
        )
    yield from _choices(settings, registry)


def _choices(settings: BufferConfig, registry: PluginRegistry) -> Iterator[Finding]:
    for kind in KINDS:
        name = getattr(settings, kind).backend
        try:
            registry.get(kind, name)
        except PluginError as exc:
            fallback = kind == "index" and any(
                other in registry.names("index") for other in settings.index.fallback
            )
            level: Literal["warning", "problem"] = "warning" if fallback else "problem"
            advice = "a fallback takes its place" if fallback else ""
            yield Finding("configuration", level, str(exc), advice)


# ---------------------------------------------------------------- a folder


def _folder(path: Path, registry: PluginRegistry) -> Iterator[Finding]:
    yield from _identity(path, registry)
    place = path.absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    yield from _file_system(place)
    yield from _room(place)
    yield from _fsync(place)


def _identity(path: Path, registry: PluginRegistry) -> Iterator[Finding]:
    if (path / NOTE).exists():
        message = f"{path} is the target of a migration or repair that is not finished"
        yield Finding("folder", "warning", message, "run the same command again to go on")
        return
    try:
        identity = folders.read_identity(path)
    except ExpbufError as exc:
        yield Finding("folder", "problem", str(exc))
        return
    if identity is None:
        yield Finding("folder", "note", f"{path} holds no buffer yet")
        return
    try:
        registry.get("persistence", identity.backend)
    except PluginError as exc:
        message = f"a buffer stored by {identity.backend!r}, which cannot be had here: {exc}"
        yield Finding("folder", "problem", message)
    else:
        yield Finding("folder", "ok", f"a buffer, stored by {identity.backend!r}")
    lock = path / folders.LOCKS / "open"
    pid = opener(lock) if lock.exists() else None
    if pid is not None:
        yield Finding("folder", "ok", f"process {pid} has it open")
    if not os.access(path, os.W_OK):
        yield Finding("folder", "note", "it may only be read here: mode 'r'")


def _file_system(place: Path) -> Iterator[Finding]:
    kind = folders.file_system(place) or "unknown"
    if not folders.shared_memory_is_coherent(place):
        message = f"{place} lies on a network file system ({kind}): one process at a time"
        yield Finding("file system", "warning", message, "use a local disk for several processes")
    elif kind in _LAYERED:
        message = f"{place} lies in a container's writable layer ({kind}): slow, and gone with it"
        yield Finding("file system", "warning", message, "put the buffer on a volume")
    elif kind in _MEMORY:
        message = f"{place} lies in memory ({kind}): nothing survives a reboot"
        yield Finding("file system", "warning", message, "use a disk for what is to be kept")
    else:
        yield Finding("file system", "ok", f"{place}: {kind}")


def _room(place: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(place).free
    text = f"{free / (1 << 30):.1f} GiB are free"
    if free < _LITTLE_ROOM:
        yield Finding("room", "warning", text, "make room before the log needs its next file")
    else:
        yield Finding("room", "ok", text)


def _fsync(place: Path) -> Iterator[Finding]:
    try:
        times = _sync_times(place)
    except OSError as exc:
        yield Finding("fsync", "note", f"not measured: nothing can be written in {place} ({exc})")
        return
    median, worst = statistics.median(times), max(times)
    text = f"a sync of {_SYNCED_BYTES} bytes takes {1e3 * median:.2f} ms (worst {1e3 * worst:.2f})"
    if median < _TOO_FAST_S:
        message = f"{text}: too fast for a disk, so it may not reach one"
        advice = "see that the disk, its controller and the virtual machine honour flushes"
        yield Finding("fsync", "note", message, advice)
    elif median > _SLOW_S:
        advice = "add many at once, add from several threads, or set durability: group"
        yield Finding("fsync", "warning", f"{text}; each commit at sync waits for one", advice)
    else:
        yield Finding("fsync", "ok", text)


def _sync_times(place: Path) -> list[float]:
    """Seconds that each of some syncs takes, into bytes that are on the disk already."""
    fd, name = tempfile.mkstemp(prefix="doctor.", suffix=".tmp", dir=place)
    try:
        os.pwrite(fd, bytes(_SYNCS * _SYNCED_BYTES), 0)
        os.fsync(fd)
        times = []
        for i in range(_SYNCS):
            os.pwrite(fd, b"\1" * _SYNCED_BYTES, i * _SYNCED_BYTES)
            started = time.perf_counter()
            os.fdatasync(fd)
            times.append(time.perf_counter() - started)
        return times
    finally:
        os.close(fd)
        with contextlib.suppress(OSError):
            os.unlink(name)
