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
    )
    for head in heads:
        table.add_column(Text(head), justify="left" if head in ("shape", "kernel") else "right")
    for found in done.shapes:
        label = found.shape.label
        for point in found.points:
            style = "bold" if point.ours else "dim"
            last = point is found.points[-1]
            table.add_row(label, *_cells(point, on_cuda), style=style, end_section=last)
            label = ""
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
        f"{unit} ({roofs.matmul}); % of roof: of what they allow at the shape's FLOP per byte",
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
    device = ["kernel ms", "kernel TFLOPS", "main kernel"] if on_cuda else []
    rate = "TFLOPS" if on_cuda else "GFLOPS"
    return ["shape", "kernel", "ms", "spread", *device, "GB/s", rate, "% of roof", "vs best rival"]


def _cells(point: Point, on_cuda: bool) -> tuple[str, ...]:
    whole = point.whole
    spread = f"{number(1e3 * whole.low)}–{number(1e3 * whole.high)}"
    device: list[str] = []
    if on_cuda:
        together = point.kernels.together.median if point.kernels else None
        device = [
            "" if value is None else number(value)
            for value in (
                None if together is None else 1e3 * together,
                point.kernel_tflops,
                point.main_kernel_tflops,
            )
        ]
    ratio = point.ratio_to_best_rival
    return (
        point.contender,
        number(1e3 * whole.median),
        spread,
        *device,
        number(point.gb_per_s),
        number(point.tflops if on_cuda else 1e3 * point.tflops),
        f"{point.percent_of_roof:.0f} %",
        "" if ratio is None else f"{ratio:.2f}x",
    )
