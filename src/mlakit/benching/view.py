"""A sweep in a terminal; tab-separated lines where there is none."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlakit.benching.result import Bench, Point
from mlakit.reporting.style import number


def print_bench(done: Bench, console: Console) -> None:
    """Prints every figure, and below them what they are shares of and who is missing."""
    on_cuda = done.settings["device"] != "cpu"
    heads = _heads(on_cuda)
    if not console.is_terminal:
        for line in (headline(done), "\t".join(heads)):
            console.file.write(line + "\n")
        for found in done.shapes:
            for point in found.points:
                cells = (found.shape.label, *_cells(point, on_cuda))
                console.file.write("\t".join(cells) + "\n")
        for line in footnotes(done):
            console.file.write(line + "\n")
        return
    table = Table(
        title=Text(headline(done), style="bold"),
        caption=Text("\n".join(footnotes(done))),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for index, head in enumerate(heads[1:]):
        table.add_column(Text(head), justify="right" if index else "left", no_wrap=True)
    for found in done.shapes:
        table.add_row(found.shape.label, style="bold")
        for point in found.points:
            name, *rest = _cells(point, on_cuda)
            last = point is found.points[-1]
            style = "" if point.ours else "dim"
            table.add_row(f"  {name}", *rest, style=style, end_section=last)
    console.print(table, highlight=False)


def headline(done: Bench) -> str:
    """The machine and the problem in one line."""
    settings, where = done.settings, done.environment
    machine = where.get("gpu") if settings["device"] != "cpu" else where["cpu"]
    width = f"{settings['kv_lora_rank']} + {settings['qk_rope_head_dim']}"
    stored = settings["cache_format"] or settings["dtype"]
    scores = ", scores over rope only" if settings["rope_scores"] else ""
    return (
        f"MLA decode on {machine}: {width}{scores}, cache {stored}, pages of "
        f"{settings['page_size']}, batch {settings['batch']}"
    )


def footnotes(done: Bench) -> list[str]:
    """Ceilings, how it was counted, who is missing, and others' published figures."""
    roofs = done.ceilings
    unit, factor = ("TFLOPS", 1.0) if roofs.matmul_tflops >= 1 else ("GFLOPS", 1e3)
    lines = [
        f"ceilings, this run: copy {number(roofs.copy_gb_per_s)} GB/s, read "
        f"{number(roofs.read_gb_per_s)} GB/s, matmul {number(factor * roofs.matmul_tflops)} "
        f"{unit} ({roofs.matmul})",
        "whole calls: ms, GB/s and rate; ±: half the distance of the quartiles; roof: of what "
        "the ceilings allow at the shape's FLOP per byte; vs rival: times faster than the fastest",
        *done.notes,
    ]
    lines += [f"not here: {name}: {reason}" for name, reason in done.absences.items()]
    lines += [f"FAILED: {failure}" for failure in [*done.failures, *done.failed_rivals]]
    for known in done.published:
        figures = [f"{known['tflops']} TFLOPS"] if known["tflops"] else []
        figures += [f"{known['gb_per_s']} GB/s"] if known["gb_per_s"] else []
        lines.append(
            f"published, not measured here: {known['kernel']}, {known['gpu']}, {known['shape']}: "
            f"{', '.join(figures)} ({known['source']})"
        )
    return lines


def _heads(on_cuda: bool) -> list[str]:
    device = ["kernels", "main"] if on_cuda else []
    rate = "TFLOPS" if on_cuda else "GFLOPS"
    return ["shape", "kernel", "ms", "±", "GB/s", rate, "roof", *device, "vs rival"]


def _cells(point: Point, on_cuda: bool) -> tuple[str, ...]:
    whole, ratio = point.whole, point.ratio_to_best_rival
    device = (point.kernel_tflops, point.main_kernel_tflops) if on_cuda else ()
    return (
        point.contender,
        number(1e3 * whole.median),
        f"{50 * (whole.high - whole.low) / whole.median:.0f} %",
        _short(point.gb_per_s),
        _short(point.tflops if on_cuda else 1e3 * point.tflops),
        f"{point.percent_of_roof:.0f} %",
        *("" if rate is None else _short(rate) for rate in device),
        "" if ratio is None else f"{ratio:.2f}x",
    )


def _short(rate: float) -> str:
    """Three digits or whole."""
    return number(round(rate) if rate >= 100 else rate)
