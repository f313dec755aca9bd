"""Counters of joules: processor packages from files, cards from a stand-in for NVML."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mlakit.evaluation.energy import EnergyMeter

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


def package(folder: Path, index: int, microjoules: int, span: int = 10**9) -> Path:
    """One zone of Linux's powercap, as its files are."""
    zone = folder / f"intel-rapl:{index}"
    zone.mkdir(parents=True, exist_ok=True)
    for name, text in {"name": f"package-{index}", "max_energy_range_uj": span}.items():
        (zone / name).write_text(f"{text}\n", encoding="ascii")
    (zone / "energy_uj").write_text(f"{microjoules}\n", encoding="ascii")
    return zone


def test_joules_are_the_counters_difference(tmp_path: Path) -> None:  # D40
    package(tmp_path, 0, 5_000_000)
    package(tmp_path, 1, 1_000_000)
    meter = EnergyMeter(CPU, powercap=tmp_path)
    before = meter.read()
    package(tmp_path, 0, 6_500_000)
    package(tmp_path, 1, 1_250_000)
    assert meter.since(before) == pytest.approx(1.75)


def test_a_counter_that_began_again_is_followed(tmp_path: Path) -> None:
    package(tmp_path, 0, 900_000_000, span=10**9)
    meter = EnergyMeter(CPU, powercap=tmp_path)
    before = meter.read()
    package(tmp_path, 0, 100_000_000)
    assert meter.since(before) == pytest.approx(200)


def test_parts_of_a_package_are_not_counted_twice(tmp_path: Path) -> None:
    package(tmp_path, 0, 0)
    (package(tmp_path, 1, 0) / "name").write_text("psys\n", encoding="ascii")
    package(tmp_path / "intel-rapl:0", 0, 0)  # a core within the package
    assert len(EnergyMeter(CPU, powercap=tmp_path).counters) == 1


@pytest.mark.parametrize("missing", ["all", "energy_uj", "max_energy_range_uj"])
def test_what_cannot_be_read_is_no_figure(tmp_path: Path, missing: str) -> None:
    if missing != "all":
        (package(tmp_path, 0, 0) / missing).unlink()
    meter = EnergyMeter(CPU, powercap=tmp_path)
    assert meter.since(meter.read()) is None


def nvml(millijoules: list[int], known: str) -> SimpleNamespace:
    """The part of NVML that is asked for; one card, which ``known`` names."""

    class NVMLError(Exception):
        pass

    def by_uuid(uuid: str) -> str:
        if uuid != known:
            raise NVMLError("not found")
        return uuid

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: millijoules.pop(0),
    )


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(uuid="0000-1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)


def test_a_card_is_found_by_its_uuid(monkeypatch: pytest.MonkeyPatch, card: None) -> None:
    # Read once to see that it counts, then before and after.
    monkeypatch.setitem(sys.modules, "pynvml", nvml([1, 2_000, 5_500], "GPU-0000-1"))
    meter = EnergyMeter(CARD)
    assert meter.since(meter.read()) == pytest.approx(3.5)


def test_a_card_that_hides_its_energy_is_no_figure(
    monkeypatch: pytest.MonkeyPatch, card: None
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml([], "GPU-other"))
    assert EnergyMeter(CARD).since([]) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert EnergyMeter(CARD).since([]) is None
