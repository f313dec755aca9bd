"""A processor for gluon_emulator: partitions that take turns, barriers, shared memory, products."""

from __future__ import annotations

import random
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


class ProtocolError(Exception):
    """The kernel broke a rule of shared memory, barriers or the tensor cores."""


class Partition(threading.Thread):
    """One partition of a thread block."""

    def __init__(self, machine: Machine, function: Callable, arguments: tuple) -> None:
        super().__init__(name=function.__name__, daemon=True)
        self.machine, self.function, self.arguments = machine, function, arguments
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.finished = False
        self.pace = 1.0
        self.products: list[Product] = []
        self.unfenced: set[tuple] = set()

    def run(self) -> None:
        self.turn.acquire()
        try:
            if not self.machine.failure:
                self.function(*self.arguments)
        except BaseException as error:
            self.machine.failure = self.machine.failure or error
        self.finished = True
        self.machine.hand_over()


class Machine:
    """A processor with one thread block on it.

    Args:
        seed: of the order in which things happen.
    """

    def __init__(self, seed: object) -> None:
        self.random = random.Random(str(seed))
        self.partitions: list[Partition] = []
        self.under_way: list[tuple[float, Callable[[], None]]] = []
        self.failure: BaseException | None = None
        self.done = threading.Semaphore(0)
        self.late = self.random.random()  # the share of products that happen when waited for

    def begin(self, action: Callable[[], None]) -> None:
        """Have something happen later; some things take far longer than others."""
        self.under_way.append((self.random.choice((0.5, 0.5, 0.01)), action))

    @property
    def current(self) -> Partition | None:
        thread = threading.current_thread()
        return thread if isinstance(thread, Partition) else None

    def run(self, functions: list[tuple[Callable, tuple]], *_: object) -> None:
        """``warp_specialize``: all partitions to their end."""
        self.partitions = [Partition(self, *each) for each in functions]
        for partition in self.partitions:
            partition.start()
        self.hand_over()
        self.done.acquire()
        for partition in self.partitions:
            partition.turn.release(2)  # whoever is left raises
            partition.join()
        if self.failure:
            raise self.failure

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others go first, and until ``ready``."""
        partition = self.current
        if partition is None:
            if not ready():
                raise ProtocolError("deadlock: one partition waits for itself")
            return
        partition.ready = ready
        if self.hand_over(partition):
            partition.turn.acquire()
        if self.failure:
            raise ProtocolError("stopped")

    def hand_over(self, partition: Partition | None = None) -> bool:
        """Draw who is next and wake it; False if it is the caller."""
        while not self.failure:
            if self.random.random() < 0.05:  # now and then someone is far slower than the rest
                for each in self.partitions:
                    each.pace = self.random.choice((1.0, 0.02))
            able = [each for each in self.partitions if not each.finished and each.ready()]
            weights = [each.pace for each in able] + [pace for pace, _ in self.under_way]
            if not weights:
                if not all(each.finished for each in self.partitions):
                    waiting = [each.name for each in self.partitions if not each.finished]
                    self.failure = ProtocolError(f"deadlock: {', '.join(waiting)} wait")
                break
            (choice,) = self.random.choices(range(len(weights)), weights)
            if choice >= len(able):
                try:
                    self.under_way.pop(choice - len(able))[1]()
                except ProtocolError as error:
                    self.failure = error
                continue
            if able[choice] is partition:
                return False
            able[choice].turn.release()
            return True
        self.done.release()
        return True


class Barrier:
    """An mbarrier: phases that so many arrivals, and the bytes they announce, complete."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.arrivals = machine, 0

    def init(self, count: int) -> None:
        self.arrivals = self.pending = count
        self.bytes = self.phase = 0

    def arrive(self, count: int = 1, expected: int = 0) -> None:
        self.machine.pause()
        self.pending -= count
        self.bytes += int(expected)
        if self.pending < 0:
            raise ProtocolError("more arrivals than a phase of the barrier has")
        self.complete(0)

    def complete(self, transferred: int) -> None:
        self.bytes -= transferred
        if not self.pending and not self.bytes:
            self.phase ^= 1
            self.pending = self.arrivals

    def wait(self, phase: Any) -> None:
        phase = int(phase)
        self.machine.pause(lambda: self.phase != phase)


@dataclass(frozen=True)
class Barriers:
    """An array of barriers, or one of them where ``index`` is not called."""

    barriers: list[Barrier]

    def index(self, i: Any) -> Barrier:
        return self.barriers[int(i)]


@dataclass(frozen=True)
class Shared:
    """Shared memory: a view of one of a machine's buffers."""

    machine: Machine
    data: torch.Tensor
    buffer: tuple = field(default_factory=lambda: (object(),))

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def index(self, i: Any) -> Shared:
        return Shared(self.machine, self.data[int(i)], (*self.buffer, int(i)))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.machine, self.data.permute(order), self.buffer)

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.machine, self.data.narrow(dim, start, length), self.buffer)

    def load(self, layout: object) -> torch.Tensor:
        self.machine.pause()
        return self.data.clone()

    def store(self, value: torch.Tensor) -> None:
        if value.dtype != self.dtype or value.shape != self.data.shape:
            raise ProtocolError(f"{value.dtype} {list(value.shape)} stored in {self.dtype}")
        self.machine.pause()
        self.data.copy_(value)
        if self.machine.current:
            self.machine.current.unfenced.add(self.buffer)

    def check_fenced(self) -> None:
        if any(self.buffer in partition.unfenced for partition in self.machine.partitions):
            raise ProtocolError("stores that no fence has made visible outside of the threads")


class Product:
    """An asynchronous matrix product, ``a b + accumulator``, which happens later.

    All that it can be used for before it is waited for is another product's accumulator.
    """

    def __init__(self, machine: Machine, a: Any, b: Shared, accumulator: Any, use: bool) -> None:
        self.machine, self.operands = machine, (a, b, accumulator if use else None)
        self.value: torch.Tensor | None = None

    def happen(self) -> None:
        if self.value is not None:
            return
        a, b, value = self.operands
        if isinstance(value, Product):
            value.happen()
            value = value.value
        for operand in (a, b):
            if isinstance(operand, Shared):
                operand.check_fenced()
        left = a.data if isinstance(a, Shared) else a
        product = left.float() @ b.data.float()
        self.value = product if value is None else product + value


@dataclass(frozen=True)
class Boxes:
    """A tensor descriptor."""

    rows: torch.Tensor
    shape: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype


def hopper(machine: Machine) -> dict[str, Any]:
    """Barriers, copies and matrix products, under the names that kernels import."""

    def load(boxes: Boxes, place: list, barrier: Barrier, shared: Shared) -> None:
        machine.pause()
        shared.check_fenced()
        shared.data.fill_(torch.nan)  # what is read before the copy is done
        (row, column), (height, width) = (int(at) for at in place), boxes.shape

        def copy() -> None:
            box = boxes.rows[row : row + height, column : column + width]
            shared.data.zero_()
            shared.data[: box.shape[0], : box.shape[1]] = box
            barrier.complete(height * width * boxes.rows.element_size())

        machine.begin(copy)

    def multiply(a: Any, b: Shared, c: Any, *, use_acc: bool = True, is_async: bool) -> Product:
        machine.pause()
        product = Product(machine, a, b, c, use_acc)
        assert machine.current is not None
        machine.current.products.append(product)
        if machine.random.random() > machine.late:
            machine.begin(product.happen)
        return product

    def wait(outstanding: int, deps: list) -> Any:
        machine.pause()
        assert machine.current is not None
        products = machine.current.products
        while len(products) > outstanding:
            products.pop(0).happen()
        values = tuple(each if any(each is p for p in products) else _value(each) for each in deps)
        return values if len(values) > 1 else values[0]

    def fence() -> None:
        machine.pause()
        if machine.current:
            machine.current.unfenced.clear()

    return {
        "mbarrier": types.SimpleNamespace(
            MBarrierLayout=lambda: "barrier",
            init=lambda barrier, count: barrier.init(count),
            wait=lambda barrier, phase: barrier.wait(phase),
            arrive=lambda barrier, count: barrier.arrive(count),
            expect=lambda barrier, size: barrier.arrive(1, size),
        ),
        "tma_load": load,
        "fence_async_shared": fence,
        "warpgroup_mma": multiply,
        "warpgroup_mma_wait": wait,
        "gdc_wait": lambda: None,
        "gdc_launch_dependents": lambda: None,
    }


def _value(result: Any) -> torch.Tensor:
    """What a product is once it has happened."""
    return result.value if isinstance(result, Product) else result
