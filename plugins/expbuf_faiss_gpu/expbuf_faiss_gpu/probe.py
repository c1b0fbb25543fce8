"""Whether a GPU can be used, found out in a process of its own.

FAISS ends the process where CUDA fails: with a driver too old for its kernels, or a GPU that they
were not built for. Here that ends only the process that asks.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from expbuf_faiss_gpu import driver

TIMEOUT_S = 120
_LISTS = 4
_ANSWER = "expbuf-probe "

import_error = ""
"""Why FAISS cannot be imported, if a probe has found that."""


@dataclass(frozen=True)
class Verdict:
    """What a probe found.

    Attributes:
        usable: The GPU answered a search.
        reason: Why it is not usable; "" if it is.
        imports: FAISS can be imported, so that its CPU indexes work.
        name: Of the GPU.
        memory: Bytes that it has.
    """

    usable: bool
    reason: str = ""
    imports: bool = True
    name: str = ""
    memory: int = 0


@functools.cache
def probe(device: int) -> Verdict:
    """Ask a process of its own, once for each device; takes some seconds where there is a GPU.

    Without a driver there is nothing to try out, and nothing that could end this process.
    """
    global import_error
    try:
        driver.library()
        verdict = _ask(device)
    except driver.DriverError as exc:
        _, wrong = _faiss()
        verdict = wrong or Verdict(False, str(exc))
    if not verdict.imports:
        import_error = verdict.reason
    return verdict


def _ask(device: int) -> Verdict:
    # Not by -m, which would warn that this module is imported already.
    program = "from expbuf_faiss_gpu.probe import main; main()"
    command = [sys.executable, "-c", program, str(device)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Verdict(False, f"the GPU did not answer within {TIMEOUT_S} s")
    except OSError as exc:
        return Verdict(False, f"the GPU could not be tried out: {exc}")
    for line in done.stdout.splitlines():
        if line.startswith(_ANSWER):
            return Verdict(**json.loads(line[len(_ANSWER) :]))
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    how = f"exit code {done.returncode}"
    if done.returncode < 0:
        how = signal.Signals(-done.returncode).name
    return Verdict(False, f"trying the GPU out ended with {how}: {last}")


def _faiss() -> tuple[Any, Verdict | None]:
    """FAISS, or what is wrong with it."""
    try:
        faiss = importlib.import_module("faiss")
    except Exception as exc:  # a wheel without its CUDA libraries raises RuntimeError
        reason = f"FAISS cannot be imported: {type(exc).__name__}: {exc}"
        return None, Verdict(False, reason, imports=False)
    if hasattr(faiss, "StandardGpuResources"):
        return faiss, None
    return None, Verdict(
        False,
        "the FAISS that is installed is built for CPUs only; uninstall faiss-cpu, then reinstall "
        "faiss-gpu",
    )


def try_out(device: int) -> Verdict:
    """Try everything, in this process, which may not survive it."""
    faiss, wrong = _faiss()
    if wrong is not None:
        return wrong
    try:
        devices = driver.count()
        if device >= devices:
            return Verdict(False, f"no GPU {device}: CUDA has {devices}, counted from 0")
        if faiss.get_num_gpus() <= device:
            return Verdict(False, "FAISS finds no GPU that it can use")
        name = driver.name(device)
        resources = faiss.StandardGpuResources()
        resources.setTempMemory(1 << 20)
        vectors = np.eye(32, dtype=np.float32)
        for factory in ("Flat", f"IVF{_LISTS},Flat"):
            index = faiss.index_factory(32, factory)
            if factory != "Flat":
                faiss.try_extract_index_ivf(index).cp.min_points_per_centroid = 1
            index.train(vectors)
            index.add(vectors)
            there = faiss.index_cpu_to_gpu(resources, device, index)
            parameters = None
            if factory != "Flat":
                parameters = faiss.SearchParametersIVF(nprobe=_LISTS)
            _, rows = there.search(vectors, 1, params=parameters)
            if not (rows[:, 0] == np.arange(32)).all():
                return Verdict(False, f"{name} gives wrong results")
        return Verdict(True, name=name, memory=driver.free_memory(device)[1])
    except (RuntimeError, MemoryError) as exc:
        return Verdict(False, (str(exc).strip().splitlines() or [repr(exc)])[-1])


def main() -> None:
    """In a process of its own: try a device out and say what was found."""
    sys.stdout.write(_ANSWER + json.dumps(asdict(try_out(int(sys.argv[1])))) + "\n")
    sys.stdout.flush()
    os._exit(0)  # what the driver does when the interpreter ends is no news any more
