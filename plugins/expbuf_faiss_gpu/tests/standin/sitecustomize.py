"""Puts the stand-in for a GPU into a process that a test starts: see gpu_standin.py."""

from __future__ import annotations

import os

if os.environ.get("EXPBUF_GPU_STANDIN"):
    import gpu_standin

    gpu_standin.install_when_imported()
