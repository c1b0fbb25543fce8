"""On the wheel of FAISS for GPUs itself (`make test-gpu-wheel`): what it has, and its fallbacks.

Nothing stands in for anything here. Where there is no GPU, the CPU's part is what is tested; where
there is one, `python -m expbuf_faiss_gpu.selfcheck` tests the rest.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from expbuf_core import ExperienceBuffer, hookimpl
from expbuf_core.contracts import IndexContext
from expbuf_core.errors import BackendUnavailable
from expbuf_faiss import FaissBackend
from expbuf_faiss_gpu import contract, devices, placing, probe
from expbuf_faiss_gpu.backend import FaissGpuBackend
from expbuf_faiss_gpu.settings import FaissGpuSettings

faiss = pytest.importorskip("faiss")
if not hasattr(faiss, "StandardGpuResources"):
    pytest.skip("needs the wheel faiss-gpu: make test-gpu-wheel", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def _no_gpu() -> None:
    if probe.probe(0).usable:
        pytest.skip("there is a GPU: python -m expbuf_faiss_gpu.selfcheck")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "buffer"


def test_what_we_call_is_there() -> None:
    """Names and fields; an unknown field of a SWIG class would be set without an error."""
    options = faiss.GpuClonerOptions()
    assert options.useFloat16 is False
    config = faiss.GpuIndexFlatConfig()
    assert config.useFloat16 is False
    assert config.device == 0
    assert faiss.get_num_gpus() == 0
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(1 << 20)
    resources.this.disown()
    assert not resources.thisown
    for method in ("add", "search"):
        assert callable(getattr(faiss.GpuIndexFlat, method))
    assert issubclass(faiss.IVFPQSearchParameters, faiss.SearchParametersIVF)


def test_what_is_called_without_a_device_raises() -> None:
    """Without a GPU this must not end the process, and it must not answer."""
    with pytest.raises(RuntimeError):
        faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, faiss.IndexFlatL2(4))
    with pytest.raises(devices.DeviceError):
        placing.put_index(devices.Device(0, 1 << 20), faiss.IndexFlatL2(4), False)
    vectors = np.eye(4, dtype=np.float32)
    with pytest.raises(devices.DeviceError):
        placing.put_vectors(devices.Device(0, 1 << 20), vectors, "l2", True)


def test_says_that_there_is_no_gpu() -> None:
    verdict = probe.probe(0)
    assert not verdict.usable
    assert verdict.imports
    assert verdict.reason


class TestOnTheCpu(contract.OnGpu):
    """The CPU index of this wheel takes over."""

    rows = 2400
    on_gpu = False
    settings: ClassVar[Mapping[str, Any]] = {"index": "IVF32,Flat", "train_iterations": 3}
    test_x42_another_process: ClassVar[Any] = None  # it would have no fallback, and refuse


def test_without_fallback_it_says_why() -> None:
    with pytest.raises(BackendUnavailable, match=r"no NVIDIA driver|CUDA says|no GPU"):
        FaissGpuBackend(FaissGpuSettings(), IndexContext(8, "cosine"))


class Observer:
    def __init__(self) -> None:
        self.events: list[tuple[str, str, str, str]] = []
        self.told = threading.Event()

    @hookimpl
    def expbuf_on_fallback(self, kind: str, wanted: str, used: str, reason: str) -> None:
        self.events.append((kind, wanted, used, reason))
        self.told.set()


def fill(buffer: ExperienceBuffer, rows: int = 2000) -> Any:
    vectors = np.random.default_rng(0).standard_normal((rows, 16)).astype(np.float32)
    columns = {"v_embed": vectors, "q_embed": vectors}
    buffer.add_many({**columns, "answer": ["a"] * rows, "confidence": [0.5] * rows})
    return vectors


def test_a_buffer(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    observer = Observer()
    index = {
        "backend": "faiss_gpu",
        "builder": "off",
        "faiss_gpu": {"index": "IVF16,Flat", "nprobe": 16},
    }
    with ExperienceBuffer.open(folder, index=index, plugins=[observer]) as buffer:
        vectors = fill(buffer)
        assert buffer.rebuild_index()
        (segment,) = buffer.stats()["index"]["segments"]
        assert segment["factory"] == "IVF16,Flat"
        assert segment["device"] == "cpu"
        found = buffer.search_many(v_embed=vectors[:50], q_embed=vectors[:50], k=1)[0]
        assert (found[:, 0] == buffer.ids()[:50]).all()
    assert observer.told.wait(60)
    ((kind, wanted, used, reason),) = observer.events
    assert (kind, wanted, used) == ("index", "faiss_gpu", "faiss_cpu")
    assert reason == probe.probe(0).reason
    assert f"'faiss_cpu' takes over: {reason}" in caplog.text
    index["fallback"] = []
    with pytest.raises(BackendUnavailable):
        ExperienceBuffer.open(folder, index=index)


def test_the_cpu_can_be_chosen(folder: Path) -> None:
    """Without the CPU's plugin, whose wheel cannot stand beside this one."""
    index = {"backend": "faiss_cpu", "builder": "off", "faiss_cpu": {"index": "IVF16,Flat"}}
    with ExperienceBuffer.open(folder, index=index) as buffer:
        fill(buffer)
        assert buffer.rebuild_index()
        (segment,) = buffer.stats()["index"]["segments"]
        assert segment["backend"] == "faiss_cpu"


def test_missing_cuda_libraries(tmp_path: Path) -> None:
    """The wheel raises RuntimeError at import then; exact search takes over."""
    hidden = tmp_path / "nvidia"
    hidden.mkdir()
    (hidden / "__init__.py").touch()  # in front of the real one, and empty
    code = """
import sys, threading
import numpy as np
from expbuf_core import ExperienceBuffer, hookimpl
class Observer:
    @hookimpl
    def expbuf_on_fallback(self, kind, wanted, used, reason):
        print(wanted, used, reason)
index = {"backend": "faiss_gpu", "builder": "off", "faiss_gpu": {"index": "IVF16,Flat"}}
with ExperienceBuffer.open(sys.argv[1], index=index, plugins=[Observer()]) as buffer:
    v = np.eye(100, dtype=np.float32)
    buffer.add_many({"v_embed": v, "q_embed": v, "answer": ["a"] * 100, "confidence": [0.5] * 100})
    assert buffer.rebuild_index()
    (segment,) = buffer.stats()["index"]["segments"]
    assert segment["backend"] == "exact", segment
    assert buffer.search_index(v_embed=v[3], q_embed=v[3], k=1).ids[0] == 3
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "buffer")],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("faiss_gpu exact faiss_gpu: ")
    assert "FAISS cannot be imported: RuntimeError" in done.stdout
    assert "'exact' takes over" in done.stderr


def test_the_self_check_says_no_device() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "expbuf_faiss_gpu.selfcheck"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout == f"no device: {probe.probe(0).reason}\n"


def test_segments_of_one_plugin_open_in_the_other(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((2000, 16)).astype(np.float32)
    ids = np.arange(2000)
    context = IndexContext(16, "l2", fallback=("faiss_cpu",))
    settings = FaissGpuSettings(index="IVF16,Flat", nprobe=16)
    here, there = FaissGpuBackend(settings, context), FaissBackend(settings, context)
    for name, builder, opener in (("a", here, there), ("b", there, here)):
        builder.build(ids, vectors, tmp_path / name)
        segment = opener.open(tmp_path / name, ids, vectors)
        assert (segment.search(vectors[:20], 1, None)[0][:, 0] == ids[:20]).all()
