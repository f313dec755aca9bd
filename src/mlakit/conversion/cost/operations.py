"""Time of a conversion: operations of each kind per phase, over the speed of each kind. No torch.

Counted are products of matrices, and passes over large intermediates as bytes; per layer, so that
depth is a factor. A processor's speed is measured when the plan is made (``machine``).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from mlakit.conversion.amounts import (
    CHECK_STEPS,
    CHECKS,
    SENSITIVITY_TOKENS,
    STEP_TOKENS,
    TRIAL_QUERIES,
)
from mlakit.conversion.cost.dimensions import Dimensions
from mlakit.conversion.cost.machine import (
    CUDA_FLOPS,
    DISK_BYTES_PER_SECOND,
    cpu_bfloat16_speed,
    cpu_bytes_per_second,
    cpu_flops,
)

PRODUCTS = 0.92
"""Of the measured speed of one large product, what products get between other work."""

FLOAT64_SPEED = 0.4
"""Half the numbers per instruction, and eigenvectors, which are no plain products."""

PASSES = 1 / 5.5
"""Of the measured speed of an addition, what exponentials, masks and complex numbers get."""

CANDIDATES = 6
"""Rotations that are tried per layer and rotary width: of two schedules, of five shrinkages those
until the error rises: five to seven were tried of real models' layers."""

KEY_BLOCK = 512
"""Keys that a kernel takes at once, hidden or not: half of them more than a query sees. From 42 to
45 and 71 to 77 GFLOP/s at windows of 512 and 2,048, as if no key were hidden but half."""

SCATTERED = 1.7
"""Time of attention of some queries, which takes a mask, over that of all: 55 to 61 GFLOP/s where
one product has 100."""

LAYER_SECONDS = 0.1
"""Building modules and configs of one layer, a few times."""

START_SECONDS = 5.0
"""Importing torch and transformers, and cutting the text into tokens."""


@dataclass(frozen=True)
class Work:
    """Operations by kind: products in float32, in the stored dtype and in float64; bytes passed
    over in memory, and bytes written to disk."""

    float32: float = 0.0
    stored: float = 0.0
    float64: float = 0.0
    passed: float = 0.0
    written: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, factor: float) -> Work:
        """So many times as much."""
        return Work(*(factor * getattr(self, f.name) for f in fields(self)))


def seconds(work: Work, size: Dimensions, device: str) -> float:
    """Time of this work; on a GPU that of no measured one."""
    if device.startswith("cuda"):
        operations = work.float32 + work.stored + work.float64
        return START_SECONDS + operations / CUDA_FLOPS + work.written / DISK_BYTES_PER_SECOND
    speed = PRODUCTS * cpu_flops()
    return (
        START_SECONDS
        + LAYER_SECONDS * size.layers
        + work.float32 / speed
        + work.stored / (speed * (cpu_bfloat16_speed() if size.stored else 1.0))
        + work.float64 / (speed * FLOAT64_SPEED)
        + work.passed / (PASSES * cpu_bytes_per_second())
        + work.written / DISK_BYTES_PER_SECOND
    )


def forward(size: Dimensions) -> Work:
    """One token through one source layer."""
    narrow = 2 * (size.source + size.active)
    bytes_passed = 4 * (24 * size.hidden + 6 * size.query) + 12 * size.inner
    return Work(stored=narrow, passed=bytes_passed) + _attention(size, size.head)


def student(size: Dimensions) -> Work:
    """One token through one converted attention, float32."""
    own = Work(float32=2 * size.target, passed=4 * 8 * size.query)
    return own + _attention(size, size.head + size.rope)


def _attention(size: Dimensions, key: int, passes: int = 0) -> Work:
    """Scores and values as wide as keys, of one token over half its window; passes over them."""
    keys = (size.window + min(KEY_BLOCK, size.window)) / 2
    return Work(float32=4 * keys * size.heads * key, passed=4 * passes * size.heads * keys)


def survey(size: Dimensions, passes: int) -> Work:
    """The source's forward with its statistics; of every width rotations and axes; one cut."""
    fitted, row = size.tokens - size.held_out, size.hidden + 1
    seen = Work(float32=2 * size.width**2 + 4 * size.query * size.head, stored=2 * size.shared)
    seen += _attention(size, 2 * size.head, passes=6)
    tried = Work()
    for rope in size.ropes:
        tried += Work(
            float32=2 * size.query * size.hidden + 2 * size.hidden**2,
            passed=4 * 10 * size.heads * (size.head + rope),
        )
        looked = _attention(size, size.head + rope)
        tried += looked.times(SCATTERED if size.held_out > TRIAL_QUERIES else 1.0)
    asked = min(TRIAL_QUERIES, size.held_out)
    keys, width = size.width // 2, size.width
    shared = Work(
        float32=2 * size.query * size.hidden * (size.query + size.hidden),
        passed=8 * 10 * size.source,
    )
    axes = Work(
        float64=2 * width**2 * row + 13 * width**3 + 9 * keys**3,
        passed=8 * 6 * width * row,
        written=8 * (width**2 + keys**2),
    )
    cut = Work(
        float64=2 * size.rank * width * row + 4 * size.rank * width**2 + 9 * keys**3,
        passed=8 * 4 * width * row,
    )
    read = Work(written=4 * size.hidden).times(size.tokens)
    once = forward(size).times(size.tokens) + seen.times(fitted) + read
    chosen = tried.times(CANDIDATES * asked) + axes.times(len(size.ropes))
    return once.times(passes) + chosen + shared + cut


def moments(size: Dimensions, folds: int) -> Work:
    """The published method: two forwards with second moments, and one per fold that is tried."""
    token = forward(size) + Work(float32=2 * (size.hidden + 1) ** 2, written=4 * size.hidden)
    tried = forward(size).times(folds * size.held_out)
    algebra = Work(float64=9 * size.width**3 + 4 * size.width * (size.hidden + 1) ** 2)
    return token.times(2 * size.tokens) + tried + algebra


def sensitivity(size: Dimensions) -> Work:
    """Up once, down once with a forward of its own, and the matrix."""
    tokens = min(SENSITIVITY_TOKENS, size.tokens - size.held_out)
    token = forward(size).times(3) + _attention(size, size.head).times(2)
    token += Work(float32=2 * size.hidden**2, written=3 * 4 * size.hidden)
    return token.times(tokens)


def predictions(size: Dimensions, sensed: bool, folds: int) -> Work:
    """The vocabulary, once for all layers: three products per sensed token; per held-out one two
    where it is judged, and one per fold that is tried."""
    tokens = (2 + folds) * size.held_out
    if sensed:
        tokens += 3 * min(SENSITIVITY_TOKENS, size.tokens - size.held_out)
    logits = Work(float32=2 * size.hidden * size.vocabulary, passed=30 * size.vocabulary)
    return logits.times(tokens)


def refinement(size: Dimensions, steps: int) -> Work:
    """Source and converted layer over all tokens, the steps, the checks between them."""
    whole = forward(size) + forward(size) + student(size) + Work(written=3 * 4 * size.hidden)
    one = student(size) + Work(float32=2 * size.hidden**2)
    fitted = min(STEP_TOKENS, size.tokens - size.held_out)
    checks = (min(max(steps // CHECK_STEPS, 1), CHECKS) + 1) * size.held_out
    update = Work(passed=4 * 12 * size.target).times(steps)
    return whole.times(size.tokens) + one.times(3 * steps * fitted + checks) + update


def writing(size: Dimensions) -> Work:
    """The tensors at their sizes, the bound of the latent, the shard, and the held-out windows."""
    algebra = Work(
        float64=2 * size.query * size.rope * size.hidden
        + 4 * size.query * size.head * size.rank
        + 2 * size.rank**2 * size.hidden
        + 3 * size.rank**3,
        passed=8 * 6 * (size.source + size.target),
        written=2 * (size.target + size.block),
    )
    judged = forward(size).times(2) + student(size).times(2)
    return algebra + judged.times(size.held_out)


def equal_cache(size: Dimensions) -> Work:
    """Decompositions of keys and values."""
    keys = size.width // 2
    return Work(
        float64=8 * keys * size.hidden * size.head + 20 * keys**3,
        written=2 * (size.target + size.block),
        passed=8 * 6 * size.source,
    )
