"""What can be configured under `persistence.lmdb`."""

from __future__ import annotations

from pydantic import BaseModel, Field

from expbuf_core.validation import Int


class LMDBSettings(BaseModel, extra="forbid", frozen=True):
    """Sizes. None of them limits what the buffer can hold."""

    map_bytes: Int = Field(
        1 << 30,
        ge=1 << 20,
        le=1 << 46,
        description="Address space that LMDB maps at first; it doubles when the data outgrow it.",
    )
    stage_bytes: Int = Field(
        4 << 20,
        ge=1 << 14,
        le=1 << 40,
        description="Size of the log that holds commits until LMDB has them.",
    )
    max_readers: Int = Field(
        512,
        ge=8,
        le=100_000,
        description="Most reads at one instant, over all processes that have it open.",
    )
