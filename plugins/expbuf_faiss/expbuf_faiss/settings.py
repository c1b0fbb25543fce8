"""The section of the configuration that both FAISS plugins read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, model_validator

from expbuf_core.validation import Int

if TYPE_CHECKING:
    from typing_extensions import Self


class FaissSettings(BaseModel):
    """How FAISS indexes are built and searched. The defaults tune themselves.

    Attributes:
        index: "auto" chooses by size and data; "flat" compares every vector; "IVFFlat" and "IVFPQ"
            take `nlist`, `m` and `nbits` from here; anything else is a FAISS factory string, taken
            as given as soon as there are enough rows to train it.
        nlist: Lists of an inverted file; None: by the number of rows.
        n_lists: The same as `nlist`.
        nprobe: Lists that a query looks at; None: calibrated after each build.
        n_probes: The same as `nprobe`.
        m: Sub-vectors of IVFPQ, must divide the dimension; None: about an eighth of it.
        nbits: Bits a sub-vector of IVFPQ.
        rerank: Candidates per wanted result whose similarity is computed anew from the raw
            vectors, where the index stores codes; None: calibrated; 0: codes decide alone.
        train_rows_per_list: Rows a list to train on.
        train_iterations: Iterations of k-means.
        flat_below: "auto" compares every vector below this number of rows.
        calibration_rows: Rows that are held out of training and searched for after each build.
        private_bytes: Codes that are scanned several times as fast, but cannot be mapped, are
            chosen by "auto" for data that are hard to search, where a segment's copy in each
            process takes no more than so many bytes. 0: never.
        mmap: Map the index file, so that processes share one copy, instead of reading it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    index: str = Field(default="auto", min_length=1)
    nlist: Int | None = Field(default=None, ge=1)
    n_lists: Int | None = Field(default=None, ge=1)
    nprobe: Int | None = Field(default=None, ge=1)
    n_probes: Int | None = Field(default=None, ge=1)
    m: Int | None = Field(default=None, ge=1)
    nbits: Int = Field(default=8, ge=1, le=12)
    rerank: Int | None = Field(default=None, ge=0)
    train_rows_per_list: Int = Field(default=64, ge=1, le=1 << 20)
    train_iterations: Int = Field(default=10, ge=1, le=10_000)
    flat_below: Int = Field(default=20_000, ge=1)
    calibration_rows: Int = Field(default=256, ge=16)
    private_bytes: Int = Field(default=1 << 25, ge=0)
    mmap: bool = True

    @model_validator(mode="after")
    def _one_value_each(self) -> Self:
        for a, b in (("nlist", "n_lists"), ("nprobe", "n_probes")):
            values = {getattr(self, a), getattr(self, b)} - {None}
            if len(values) > 1:
                raise ValueError(f"{a} and {b} are the same setting, with two values here")
        return self

    @property
    def lists(self) -> int | None:
        """`nlist` or `n_lists`."""
        return self.nlist or self.n_lists

    @property
    def probes(self) -> int | None:
        """`nprobe` or `n_probes`."""
        return self.nprobe or self.n_probes
