"""How busy and how hungry: the process's own CPU time, the kernel's energy counters, and NVML, which stands in here."""

import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from forerun.bench import meter
from forerun.bench.lanes import Lane, weighted
from forerun.bench.meter import Counter, Meter, Reading
from forerun.config import Variant


def measured(device: str, rapl: Path, seconds: float = 0.0) -> Reading:
    found = Meter(device, rapl)
    found.start()
    sum(i * i for i in range(300_000))
    time.sleep(seconds)
    return found.stop()


def zone(folder: Path, name: str, micro: int, wrap: int = 1000_000_000) -> Path:
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    (place / "energy_uj").write_text(f"{micro}\n")
    (place / "max_energy_range_uj").write_text(f"{wrap}\n")
    return place / "energy_uj"


def test_a_busy_process_is_seen(tmp_path: Path) -> None:
    busy = measured("cpu", tmp_path)
    assert busy.cpu_percent is not None
    assert 0 < busy.cpu_percent <= 101
    assert busy.seconds > 0
    assert busy.gpu_percent is busy.joules is None, "no GPU, no counters"


def test_energy_of_the_packages(tmp_path: Path) -> None:
    first, second = zone(tmp_path, "intel-rapl:0", 5_000_000), zone(tmp_path, "intel-rapl:1", 999_000_000)
    zone(tmp_path, "intel-rapl:0:0", 1)  # a part of the first
    found = Meter("cpu", tmp_path)
    found.start()
    first.write_text("7500000\n")
    second.write_text("4000000\n")
    assert found.stop().joules == pytest.approx(2.5 + 5.0), "the second began again at 1000 J"
    found.start()
    second.unlink()
    assert found.stop().joules is None


def test_counters_that_fall_without_a_wrap_tell_nothing() -> None:
    assert meter.used({"a": Counter(5.0)}, {"a": Counter(4.0)}) is None
    assert meter.used({"a": Counter(5.0, 10.0)}, {"a": Counter(4.0, 10.0)}) == 9.0
    assert meter.used({}, {}) is None


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine of two GPUs: each is known by its UUID; the energy counters stand still unless they are moved."""
    library: Any = ModuleType("pynvml")
    library.NVMLError = type("NVMLError", (Exception,), {})
    library.millijoules = {"GPU-zero": 1000, "GPU-one": 5000}
    library.nvmlInit = lambda: None
    library.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    library.nvmlDeviceGetUtilizationRates = lambda uuid: SimpleNamespace(gpu={"GPU-zero": 40, "GPU-one": 80}[uuid])
    library.nvmlDeviceGetTotalEnergyConsumption = lambda uuid: library.millijoules[uuid]
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=["zero", "one"][index]))
    return library


def test_the_gpu_that_works_is_watched(nvml: Any) -> None:
    found = Meter("cuda:1")
    found.start()
    nvml.millijoules["GPU-zero"] += 9000
    nvml.millijoules["GPU-one"] += 250
    reading = found.stop()
    assert (reading.gpu_percent, reading.joules) == (80.0, 0.25)
    assert found.thread is None, "no thread is left"
    both = Meter("cuda:0", spread=True)
    both.start()
    nvml.millijoules["GPU-zero"] += 1000
    assert both.stop().gpu_percent == 60.0


def test_a_gpu_that_does_not_tell(nvml: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(_: object) -> None:
        raise nvml.NVMLError

    nvml.nvmlDeviceGetTotalEnergyConsumption = refuse
    assert measured("cuda:0", tmp_path).joules is None
    nvml.nvmlDeviceGetUtilizationRates = refuse
    assert measured("cuda:0", tmp_path).gpu_percent is None
    nvml.nvmlDeviceGetHandleByUUID = refuse
    assert measured("cuda:0", tmp_path).gpu_percent is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    zone(tmp_path, "intel-rapl:0", 1)
    reading = measured("cuda:0", tmp_path)
    assert (reading.gpu_percent, reading.joules) == (None, None), "the CPU's energy is not the GPU's"


def test_the_readings_of_a_variant_are_put_together(tmp_path: Path) -> None:
    lane = Lane("a", Variant(), tmp_path)
    lane.readings = [Reading(1.0, 10.0, None, 3.0), Reading(3.0, 50.0, 70.0, 4.0)]
    run = lane.run()
    assert (run.cpu_percent, run.utilization_percent, run.energy_joules) == (40.0, 70.0, 7.0)
    lane.readings.append(Reading(1.0, 10.0, None, None))
    assert lane.run().energy_joules is None, "part of the energy is not the energy"
    assert weighted([(None, 1.0)]) is None
