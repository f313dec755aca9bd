"""Runs Gluon and Triton kernels' own Python on the CPU: what they compute and how they wait.

Gluon has no interpreter. Here a kernel's function is given other globals, in which ``gl`` and its
neighbours are made of torch, and each partition of ``warp_specialize`` is a thread. One thread runs
at a time; at every operation on a barrier, on shared memory or on the tensor cores a seeded draw
decides who goes on, and when copies and matrix products that are under way happen. So a run is
reproducible, nothing is timed, and a deadlock is when nobody can go on.

Caught are deadlocks, too many arrivals, shared memory that is overwritten too early or read too
late (a copy under way leaves NaN), results used before they are waited for, and stores that the
tensor cores may not see for want of a fence. Not seen are layouts, alignment, and anything slow.
"""

from __future__ import annotations

import ast
import inspect
import random
import textwrap
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.experimental.gluon import language as gluon_language
from triton.runtime.jit import JITFunction


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
                self.under_way.pop(choice - len(able))[1]()
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
class Pointer:
    """A pointer to numbers of a tensor, or many."""

    numbers: torch.Tensor
    offset: Any = 0

    @classmethod
    def to(cls, tensor: torch.Tensor) -> Pointer:
        size = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
        return cls(tensor.as_strided((size,), (1,)))

    @property
    def dtype(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(element_ty=self.numbers.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.numbers, self.offset + offset)

    def places(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        offset, mask = torch.broadcast_tensors(
            torch.as_tensor(self.offset).long(), torch.as_tensor(True if mask is None else mask)
        )
        inside = (offset >= 0) & (offset < len(self.numbers))
        if not inside[mask].all():
            raise ProtocolError("a pointer leaves its tensor")
        return offset, mask


@dataclass(frozen=True)
class Boxes:
    """A tensor descriptor."""

    rows: torch.Tensor
    shape: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype


class Language:
    """``gl`` and ``tl``, on one machine, for one program of a grid."""

    def __init__(self, machine: Machine, program: tuple[int, ...], grid: tuple[int, ...]) -> None:
        self.machine, self.program, self.grid = machine, program, grid
        self.int32, self.int64, self.float32 = torch.int32, torch.int64, torch.float32
        self.exp2, self.static_range = torch.exp2, range
        self.warp_specialize = machine.run

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Layout"):
            return lambda *_: None
        raise AttributeError(name)

    def program_id(self, axis: int) -> torch.Tensor:
        return torch.tensor(self.program[axis], dtype=torch.int32)

    def num_programs(self, axis: int) -> int:
        return self.grid[axis]

    def arange(self, start: int, stop: int, layout: object = None) -> torch.Tensor:
        return torch.arange(start, stop, dtype=torch.int32)

    def full(self, shape: list, value: float, dtype: Any, layout: object = None) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype)

    def zeros(self, shape: list, dtype: Any, layout: object = None) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def to_tensor(self, value: Any) -> torch.Tensor:
        return torch.as_tensor(value)

    def convert_layout(self, value: torch.Tensor, layout: object) -> torch.Tensor:
        return value

    def inline_asm_elementwise(self, asm: str, *rest: Any, **options: Any) -> Any:
        return rest[1][0]

    def where(self, condition: Any, a: Any, b: Any) -> torch.Tensor:
        return torch.where(torch.as_tensor(condition), a, b)

    def minimum(self, a: Any, b: Any) -> torch.Tensor:
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))

    def maximum(self, a: Any, b: Any) -> torch.Tensor:
        return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))

    def cdiv(self, a: Any, b: Any) -> Any:
        return (a + b - 1) // b

    def log2(self, value: Any) -> torch.Tensor:
        return torch.log2(torch.as_tensor(value))

    def max(self, value: torch.Tensor, axis: int) -> torch.Tensor:
        return value.amax(axis)

    def sum(self, value: torch.Tensor, axis: int | None = None) -> torch.Tensor:
        return value.sum(axis, dtype=value.dtype)

    def cumsum(self, value: torch.Tensor, axis: int) -> torch.Tensor:
        return value.cumsum(axis, dtype=value.dtype)

    def load(self, pointer: Pointer, mask: Any = None, other: float = 0) -> torch.Tensor:
        offset, mask = pointer.places(mask)
        value = torch.full(offset.shape, other, dtype=pointer.numbers.dtype)
        value[mask] = pointer.numbers[offset[mask]]
        return value

    def store(self, pointer: Pointer, value: Any, mask: Any = None) -> None:
        offset, mask = pointer.places(mask)
        value = torch.as_tensor(value).to(pointer.numbers.dtype).broadcast_to(offset.shape)
        pointer.numbers[offset[mask]] = value[mask]

    def allocate_shared_memory(self, dtype: Any, shape: list, layout: object) -> Any:
        if layout == "barrier":
            return Barriers([Barrier(self.machine) for _ in range(shape[0])])
        return Shared(self.machine, torch.full(shape, torch.nan, dtype=dtype))


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


class Emulated:
    """Stands in for a kernel: ``Emulated(kernel)[grid](*arguments, **options)``.

    Args:
        kernel: a ``gluon.jit`` or ``triton.jit`` function.
        seed: of the order in which things happen.
        edited: by function name, code to run in place of the function's; see ``without``.
    """

    def __init__(
        self, kernel: JITFunction, seed: int = 0, edited: dict[str, types.CodeType] | None = None
    ) -> None:
        self.kernel, self.seed, self.edited = kernel, seed, edited or {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            names = [parameter.name for parameter in self.kernel.params]
            known = {name: value for name, value in options.items() if name in names}
            values = [_argument(value) for value in arguments]
            for program in _programs(grid):
                machine = Machine((self.seed, program))
                language = Language(machine, program, grid)
                self.bind(machine, language)(*values, **known)
                if machine.under_way:
                    raise ProtocolError("a copy or a product that nobody waits for")

        return launch

    def bind(self, machine: Machine, language: Language) -> Callable:
        """The kernel as a Python function whose globals are the machine's."""
        replaced = {
            **hopper(machine),
            "gl": language,
            "tl": language,
            "range": lambda *of: map(torch.tensor, range(*map(int, of))),
        }
        modules: dict[str, dict[str, Any]] = {}

        def bound(function: types.FunctionType) -> Callable:
            code = self.edited.get(function.__name__, function.__code__)
            return types.FunctionType(code, module(function), function.__name__)

        def module(function: types.FunctionType) -> dict[str, Any]:
            if function.__module__ not in modules:
                names = modules[function.__module__] = dict(function.__globals__)
                for name, value in function.__globals__.items():
                    if isinstance(value, JITFunction):
                        names[name] = bound(value.fn)
                    elif isinstance(value, gluon_language.constexpr):
                        names[name] = value.value
                names.update(replaced)
            return modules[function.__module__]

        return bound(self.kernel.fn)


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Pointer.to(value)
    if hasattr(value, "block_shape"):
        return Boxes(value.base, tuple(value.block_shape))
    return value


def _value(result: Any) -> torch.Tensor:
    """What a product is once it has happened."""
    return result.value if isinstance(result, Product) else result


def _programs(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    indices = torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, len(grid))
    return [tuple(index) for index in indices.tolist()]


WAITING = ("mbarrier.wait", "mbarrier.arrive", "fence_async_shared", "warpgroup_mma_wait")


def rules(function: JITFunction) -> list[str]:
    """The calls by which a function waits, arrives or fences."""
    return [ast.unparse(call) for call in _rules(_tree(function))]


def without(function: JITFunction, number: int) -> dict[str, types.CodeType]:
    """A function without one of its ``rules``, as ``Emulated`` takes it.

    A wait for matrix products waits for one product less.
    """
    tree = ast.Module([_tree(function)], [])
    call = _rules(tree)[number]
    if ast.unparse(call.func) == "warpgroup_mma_wait":
        call.args[0] = ast.BinOp(call.args[0], ast.Add(), ast.Constant(1))
    else:
        call.func, call.args, call.keywords = ast.Name("dict", ast.Load()), [], []
    module = compile(ast.fix_missing_locations(tree), "edited", "exec", dont_inherit=True)
    (code,) = (part for part in module.co_consts if isinstance(part, types.CodeType))
    return {function.fn.__name__: code}


def _tree(function: JITFunction) -> ast.FunctionDef:
    """A function without decorators and annotations."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(function.fn))).body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    for argument in definition.args.args:
        argument.annotation = None
    return definition


def _rules(tree: ast.AST) -> list[ast.Call]:
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [call for call in calls if ast.unparse(call.func) in WAITING]
