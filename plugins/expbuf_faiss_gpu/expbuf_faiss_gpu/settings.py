"""The section `faiss_gpu` of the configuration."""

from __future__ import annotations

from pydantic import Field

from expbuf_core.validation import Int
from expbuf_faiss import FaissSettings


class FaissGpuSettings(FaissSettings):
    """What FAISS's indexes have, and where on a GPU they go.

    Attributes:
        device: Number of the GPU as CUDA counts them, after CUDA_VISIBLE_DEVICES.
        float16: Keep vectors in half precision on the GPU: half the memory; results are computed
            anew from the raw vectors, so similarities stay exact.
        temp_memory_bytes: Scratch memory taken at once and kept; 0: taken for each search, which
            is slower. FAISS by itself would take 1.5 GB.
    """

    device: Int = Field(default=0, ge=0)
    float16: bool = False
    temp_memory_bytes: Int = Field(default=256 << 20, ge=0)
