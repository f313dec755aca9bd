"""Shape tracing: watch any attention layer compute, and tell what every tensor was.

Nothing is patched. While a layer runs, torch hands every operation to a ``TorchFunctionMode``, so
what is told is what was computed, in the order it was computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mlakit.errors import UnsupportedModelError
from mlakit.nn.attention import MultiHeadAttention, SimpleCache
from mlakit.nn.journey import LayerJourney, tell
from mlakit.nn.roles import PROJECTIONS
from mlakit.nn.watch import Watch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ShapeTracker(TorchFunctionMode):
    """What ``track_shapes`` yields: ``journeys`` fills up while the model runs.

    Attributes:
        journeys: one per attention layer and forward pass, in order.
        keep_weights: also keep every layer's attention weights.
    """

    def __init__(self, keep_weights: bool = False) -> None:
        super().__init__()
        self.journeys: list[LayerJourney] = []
        self.keep_weights = keep_weights
        self._watch: Watch | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Let the operation happen, then note it; called by torch for each one."""
        result = func(*args, **(kwargs or {}))
        if self._watch is not None:
            operation = func.__name__.partition(".")[0].strip("_")
            self._watch.saw(operation, args, kwargs or {}, result)
        return result

    def text(self) -> str:
        """The journeys as text, alike neighbouring layers told once."""
        return tell(self.journeys)

    def begin(self, name: str, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """An attention layer starts."""
        hidden = args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "x"]
        cache = kwargs.get("past_key_values", kwargs.get("cache"))
        self._watch = Watch(name, layer, hidden, cache, self.keep_weights)

    def projected(self, child: str, result: Tensor) -> None:
        """One of its projections returned."""
        if self._watch is not None:
            self._watch.projected(child, result)

    def end(self) -> None:
        """It returned, or failed."""
        if self._watch is not None:
            self.journeys.append(self._watch.journey())
        self._watch = None


@contextmanager
def track_shapes(model: nn.Module, *, keep_weights: bool = False) -> Iterator[ShapeTracker]:
    """Watch the attention layers of a model: any whose projections are named as usual.

    Example::

        with track_shapes(model) as shapes:
            model(input_ids)
        print(shapes.text())

    Args:
        model: a whole model or one attention layer: ours, converted, or of transformers.
        keep_weights: also keep attention weights ``[B, H, S, T]`` (memory grows with S times T).

    Yields:
        the tracker. Nothing of it stays in the model afterwards.

    Raises:
        UnsupportedModelError: no attention layer was recognised.
    """
    tracker = ShapeTracker(keep_weights)
    handles = [
        handle for name, layer in _attention_layers(model) for handle in _hook(tracker, name, layer)
    ]
    try:
        with tracker:
            yield tracker
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def trace_example(*, keep_weights: bool = False) -> ShapeTracker:
    """The lesson's example: a sentence of 6 tokens, embedding 128, 4 heads: 128 → 4 × 32 → 128."""
    attention = MultiHeadAttention(hidden_size=128, num_attention_heads=4)
    x = torch.randn(1, 6, 128, generator=torch.Generator().manual_seed(0))
    with track_shapes(attention, keep_weights=keep_weights) as tracker:
        attention(x, causal=True, cache=SimpleCache())
    return tracker


@torch.no_grad()
def trace_model(
    model: PreTrainedModel, token_ids: list[int], *, keep_weights: bool = False
) -> ShapeTracker:
    """Read a text and write one token, watched: each layer once for the text, once for the token.

    Args:
        model: converted or ordinary, as ``mlakit.load`` gives it.
        token_ids: the text, at least one token.
        keep_weights: also keep attention weights.
    """
    from mlakit.nn.hf import new_cache

    text = torch.tensor([token_ids], device=model.device)
    cache = new_cache(model, 1, len(token_ids) + 1)
    with track_shapes(model, keep_weights=keep_weights) as tracker:
        logits = model(input_ids=text, past_key_values=cache, use_cache=True).logits
        written = logits[:, -1:].argmax(dim=-1)
        model(input_ids=written, past_key_values=cache, use_cache=True)
    return tracker


def _attention_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    found = []
    for name, module in model.named_modules():
        children = {child for child, _ in module.named_children()}
        if "o_proj" in children and children & {"q_proj", "q_a_proj"}:
            found.append((name, module))
    if not found:
        raise UnsupportedModelError(
            f"no attention layer recognised in {type(model).__name__}: "
            "none has both q_proj (or q_a_proj) and o_proj",
            remedy="trace a model of the Llama, Mistral, Qwen or DeepSeek kind",
        )
    return found


def _hook(tracker: ShapeTracker, name: str, layer: nn.Module) -> Iterator[Any]:
    yield layer.register_forward_pre_hook(
        lambda module, args, kwargs: tracker.begin(name, module, args, kwargs), with_kwargs=True
    )
    for child, projection in layer.named_children():
        if child in PROJECTIONS:
            yield projection.register_forward_hook(
                lambda _module, _args, result, child=child: tracker.projected(child, result)
            )
    yield layer.register_forward_hook(lambda *_: tracker.end(), always_call=True)
