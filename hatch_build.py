"""Builds the compiled part of expbuf-core, where there is a C compiler.

The package works without it, more slowly: `expbuf_core/native` says what it is.
`EXPBUF_NATIVE=0` in the environment makes a wheel without it, which is for every platform.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "expbuf_core/native"


class NativeCode(BuildHookInterface):
    """Adds the extension module to wheels; to the source tree for an editable installation."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it builds; `version` is "standard" or "editable"."""
        if self.target_name != "wheel" or os.environ.get("EXPBUF_NATIVE", "1") == "0":
            return
        self._folder = tempfile.mkdtemp(prefix="expbuf-native-")
        try:
            built = compiled(Path(self.root), Path(self._folder))
            if version == "editable":
                install(built, Path(self.root, PACKAGE, built.name))
        except (Exception, SystemExit) as exc:  # no compiler, no headers, another platform
            self.app.display_warning(f"expbuf-core goes without native code: {exc}")
            return
        if version != "editable":
            build_data["force_include"][str(built)] = f"{PACKAGE}/{built.name}"
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called by hatchling when the wheel is there."""
        shutil.rmtree(getattr(self, "_folder", ""), ignore_errors=True)


def install(built: Path, place: Path) -> None:
    """Put it there as a new file: processes that run have the old one mapped into their memory."""
    new = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        shutil.copy2(built, new)
        os.replace(new, place)
    finally:
        new.unlink(missing_ok=True)


def compiled(root: Path, folder: Path) -> Path:
    """The extension module, built there.

    Args:
        root: Of the project.
        folder: For what is built.
    """
    from setuptools import Distribution, Extension
    from setuptools.command.build_ext import build_ext

    sources = sorted((root / PACKAGE).glob("*.[ch]"))
    crc = zlib.crc32(b"".join(path.read_bytes() for path in sources))
    extension = Extension(
        "expbuf_core.native._native",
        [str(root / PACKAGE / "module.c")],
        # What is imported beside other sources is told from what fits; see native/__init__.py.
        define_macros=[("SOURCES", f"{crc}u")],
        libraries=["m"],
        # No fused multiply-add: the same vectors on every processor.
        extra_compile_args=["-O2", "-g0", "-ffp-contract=off"],
    )
    command = build_ext(Distribution({"name": "expbuf-core", "ext_modules": [extension]}))
    command.build_lib = command.build_temp = str(folder)
    command.ensure_finalized()
    command.run()
    return Path(command.get_ext_fullpath(extension.name))
