"""What a sweep found, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mlakit.benching.clock import Ceilings, KernelTiming, Timing
from mlakit.benching.problem import Shape


@dataclass(frozen=True)
class Point:
    """One contender at one shape.

    Attributes:
        contender: its name.
        ours: it is one of our implementations.
        whole: seconds of the whole call.
        kernels: device time of its kernels; None on the CPU.
        gb_per_s: of the whole call.
        tflops: of the whole call.
        percent_of_roof: of what the measured ceilings allow at this intensity.
        ratio_to_best_rival: how many times faster than the fastest rival of the same run; None for
            rivals, and if there was none.
        largest_error: of an output against float64.
        kernel_gb_per_s: by the device time of all kernels.
        kernel_tflops: likewise.
        main_kernel_tflops: by the longest kernel alone, combine excluded, as FlashMLA's tests do.
    """

    contender: str
    ours: bool
    whole: Timing
    kernels: KernelTiming | None
    gb_per_s: float
    tflops: float
    percent_of_roof: float
    ratio_to_best_rival: float | None
    largest_error: float
    kernel_gb_per_s: float | None
    kernel_tflops: float | None
    main_kernel_tflops: float | None


@dataclass(frozen=True)
class Missing:
    """A contender that has no figure at a shape.

    Attributes:
        contender: its name.
        reason: why not.
        failed: it ran and was wrong, or it broke; otherwise it never took part.
    """

    contender: str
    reason: str
    failed: bool


@dataclass(frozen=True)
class ShapeResult:
    """All contenders at one shape.

    Attributes:
        shape: the shape.
        points: who was timed.
        missing: who was not, and why.
        matmul_tflops: on the CPU, of the matrix product that took its turn with them: the roof
            there, because others' work changes it from minute to minute.
    """

    shape: Shape
    points: tuple[Point, ...]
    missing: tuple[Missing, ...]
    matmul_tflops: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, the counted FLOP and bytes beside the shape."""
        counts = {
            "mean_length": sum(self.shape.lengths) / self.shape.batch,
            "flops": self.shape.flops,
            "bytes": self.shape.nbytes,
            "flops_per_byte": self.shape.intensity,
        }
        return {**asdict(self), "shape": {**asdict(self.shape), **counts}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ShapeResult:
        """The inverse of ``as_dict``."""
        shape = {key: values["shape"][key] for key in asdict(Shape(1, 1, 1))}
        points = []
        for point in values["points"]:
            device = point["kernels"]
            if device:
                both = (Timing(**device["together"]), Timing(**device["longest"]))
                device = KernelTiming(*both, device["name"])
            points.append(Point(**{**point, "whole": Timing(**point["whole"]), "kernels": device}))
        missing = tuple(Missing(**entry) for entry in values["missing"])
        return cls(Shape(**shape), tuple(points), missing, values["matmul_tflops"])


@dataclass(frozen=True)
class Bench:
    """A whole sweep.

    Attributes:
        settings: what was asked for and what was chosen, in words.
        environment: machine and software.
        ceilings: what the machine can do.
        shapes: what was measured, in order.
        published: figures that others have published: for reference, not measured here.
        notes: what the reader should know.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    ceilings: Ceilings
    shapes: tuple[ShapeResult, ...]
    published: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "settings": self.settings,
            "environment": self.environment,
            "ceilings": asdict(self.ceilings),
            "shapes": [shape.as_dict() for shape in self.shapes],
            "published": list(self.published),
            "notes": list(self.notes),
        }

    @property
    def failures(self) -> list[str]:
        """Where one of our own implementations was wrong or broke, one line each."""
        return [line for name, line in self._failed() if name in self.settings["kernels"]]

    @property
    def failed_rivals(self) -> list[str]:
        """The same of the others'."""
        return [line for name, line in self._failed() if name not in self.settings["kernels"]]

    def _failed(self) -> list[tuple[str, str]]:
        return [
            (missing.contender, f"{missing.contender} at {found.shape.label}: {missing.reason}")
            for found in self.shapes
            for missing in found.missing
            if missing.failed
        ]

    @property
    def absences(self) -> dict[str, str]:
        """Contenders without any figure that never failed, and why."""
        present = {point.contender for found in self.shapes for point in found.points}
        reasons = {
            missing.contender: missing.reason
            for found in self.shapes
            for missing in found.missing
            if not missing.failed
        }
        return {name: reason for name, reason in reasons.items() if name not in present}


def make_points(
    shape: Shape,
    timings: dict[str, Timing],
    kernels: dict[str, KernelTiming | None],
    errors: dict[str, float],
    our_names: Sequence[str],
    ceilings: Ceilings,
    matmul_tflops: float | None = None,
) -> tuple[Point, ...]:
    """Rates and ratios of what was timed at one shape.

    Args:
        shape: the shape.
        timings: of whole calls.
        kernels: of their kernels on the device.
        errors: largest error of each contender's output.
        our_names: which contenders are ours.
        ceilings: of the machine.
        matmul_tflops: of a matrix product that took its turn with them, if one did.
    """
    rivals = [timing.median for name, timing in timings.items() if name not in our_names]
    points = []
    for name, whole in timings.items():
        device = kernels.get(name)
        tflops = shape.flops / whole.median / 1e12
        mine = name in our_names
        points.append(
            Point(
                contender=name,
                ours=mine,
                whole=whole,
                kernels=device,
                gb_per_s=shape.nbytes / whole.median / 1e9,
                tflops=tflops,
                percent_of_roof=100 * tflops / ceilings.roof(shape.intensity, matmul_tflops),
                ratio_to_best_rival=min(rivals) / whole.median if mine and rivals else None,
                largest_error=errors[name],
                kernel_gb_per_s=shape.nbytes / device.together.median / 1e9 if device else None,
                kernel_tflops=shape.flops / device.together.median / 1e12 if device else None,
                main_kernel_tflops=shape.flops / device.longest.median / 1e12 if device else None,
            )
        )
    return tuple(points)
