"""What can be configured under `persistence.file`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from expbuf_core.validation import Int


class FileSettings(BaseModel, extra="forbid", frozen=True):
    """Sizes of the log files, and how a commit gets into them."""

    initial_bytes: Int = Field(
        1 << 20,
        ge=1 << 14,
        le=1 << 40,
        description="Size of the first log file; each next one is twice that.",
    )
    segment_bytes: Int = Field(
        64 << 20, ge=1 << 14, le=1 << 40, description="Log files grow no larger than this."
    )
    commit: Literal["append", "rename"] = Field(
        "append",
        description="append: to the log. rename: each commit is a file of its own, written aside, "
        "synced and renamed: slower, for file systems where appends cannot be trusted.",
    )
