"""How busy the machine is while a variant decodes, and the energy that takes: NVML for GPUs, the kernel's RAPL for CPUs."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from forerun.bench.hardware import allowed_cpus

RAPL = Path("/sys/class/powercap")
EVERY_S = 0.1  # between two looks at a GPU: NVML's figure covers the last sixth to whole second


@dataclass(frozen=True)
class Reading:
    """What one stretch of work took; None where nothing tells."""

    seconds: float
    cpu_percent: float | None  # of all allowed cores, by this process
    gpu_percent: float | None  # mean over the GPUs at work
    joules: float | None  # of the GPUs at work; without one, of the CPU packages, whoever uses them


class Meter:
    """Read between `start` and `stop`; neither belongs on the clock. On a GPU a thread samples how busy it is."""

    def __init__(self, device: str, rapl: Path = RAPL, *, spread: bool = False) -> None:
        """`spread`: over all visible GPUs, not just the one that `device` names."""
        self.gpus = Gpus(devices(device, spread)) if device.startswith("cuda") else None
        self.rapl = rapl
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None
        self.seen: list[float] = []

    def start(self) -> None:
        self.seen, self.ended = [], threading.Event()
        if self.gpus is not None and self.gpus.handles:
            self.thread = threading.Thread(target=self.watch, args=(self.gpus,), daemon=True)
            self.thread.start()
        self.energy = self.spent()
        self.cpu, self.began = time.process_time(), time.perf_counter()

    def stop(self) -> Reading:
        seconds, cpu = time.perf_counter() - self.began, time.process_time() - self.cpu
        energy = self.spent()
        self.ended.set()
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        return Reading(
            seconds,
            100 * cpu / (seconds * (allowed_cpus() or 1)) if seconds > 0 else None,
            fmean(self.seen) if self.seen else None,
            used(self.energy, energy),
        )

    def watch(self, gpus: Gpus) -> None:
        while not self.ended.wait(EVERY_S) or not self.seen:  # at least once: the work may have ended sooner
            if (percent := gpus.percent()) is None:
                return
            self.seen.append(percent)

    def spent(self) -> dict[str, Counter]:
        return self.gpus.joules() if self.gpus is not None else packages(self.rapl)


@dataclass(frozen=True)
class Counter:
    """Joules since some moment; it begins again at `wrap`."""

    joules: float
    wrap: float | None = None


def used(before: dict[str, Counter], after: dict[str, Counter]) -> float | None:
    """Joules between two readings of the same counters; None where one is missing or there are none."""
    if not before or before.keys() != after.keys():
        return None
    total = 0.0
    for name, counter in after.items():
        passed = counter.joules - before[name].joules
        if passed < 0 and counter.wrap is None:
            return None
        total += passed if passed >= 0 else passed + (counter.wrap or 0.0)
    return total


def packages(folder: Path) -> dict[str, Counter]:
    """RAPL's counter of each CPU package; empty where the system has none or only root may read them."""
    found: dict[str, Counter] = {}
    for zone in sorted(folder.glob("intel-rapl:*")):  # AMD's too
        if zone.name.count(":") > 1:  # a part of a package
            continue
        try:
            micro, wrap = (int((zone / name).read_text()) for name in ("energy_uj", "max_energy_range_uj"))
        except (OSError, ValueError):
            return {}
        found[zone.name] = Counter(micro / 1e6, wrap / 1e6)
    return found


def devices(device: str, spread: bool) -> list[int]:
    return list(range(torch.cuda.device_count())) if spread else [torch.device(device).index or 0]


class Gpus:
    """NVML's view of some of the GPUs that torch sees; of none of them where its Python bindings are missing."""

    def __init__(self, indices: Sequence[int]) -> None:
        self.handles: dict[str, Any] = {}
        try:
            import pynvml
        except ImportError:
            return
        self.nvml = pynvml
        try:
            pynvml.nvmlInit()
            # NVML counts all GPUs of the machine, torch those of CUDA_VISIBLE_DEVICES: only the UUID means the same to both.
            uuids = [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in indices]
            self.handles = {uuid: pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids}
        except pynvml.NVMLError:
            self.handles = {}

    def percent(self) -> float | None:
        try:
            return fmean(float(self.nvml.nvmlDeviceGetUtilizationRates(handle).gpu) for handle in self.handles.values())
        except self.nvml.NVMLError:
            return None

    def joules(self) -> dict[str, Counter]:
        """The counters since the driver was loaded; empty where a GPU older than Volta has none."""
        read = self.nvml.nvmlDeviceGetTotalEnergyConsumption if self.handles else None
        try:
            return {uuid: Counter(read(handle) / 1e3) for uuid, handle in self.handles.items()} if read else {}
        except self.nvml.NVMLError:
            return {}
