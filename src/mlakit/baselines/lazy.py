"""LazyLLM: later layers read fewer tokens, and what they left out can come back.

The newest token's attention decides, layer by layer, which tokens go on. What a token was when it
stopped is kept beside the cache, so that a later token that looks at it lets it go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutput

from mlakit.baselines.method import Bench, Method, Setting, Variant
from mlakit.baselines.prefix import SeenQueries
from mlakit.baselines.tokens import attention_scores, kept
from mlakit.baselines.weights import decoder_layers
from mlakit.errors import UnsupportedModelError
from mlakit.spec import ModelSpec

SHARES = (0.5, 0.25)
"""Tokens that the last third of the layers reads."""

CHECKED, AGREEMENT = 16, 0.05
"""Tokens on which the loop here must agree with the model's own, and how far: 16-bit rounding."""


def cuts(layers: int, share: float) -> dict[int, float]:
    """Layers after which tokens stop, and the share that goes on: after both thirds."""
    first, second = round(layers / 3), round(2 * layers / 3)
    return {first - 1: (1 + share) / 2, second - 1: share}


class LazyLayer(DynamicLayer):
    """One layer's keys and values of the tokens that reached it, and those that stopped before.

    Attributes:
        places: of the held tokens, ascending, int32 ``[n]``.
        states: of stopped tokens, what this layer would have read ``[m, D]``.
        stopped: their places, int32 ``[m]``.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, hidden: Tensor) -> None:
        """Empty, for states like ``[0, D]``."""
        super().__init__()
        self.places = self.stopped = torch.empty(0, dtype=torch.int32, device=hidden.device)
        self.states = hidden
        self.is_initialized = False

    def stop(self, states: Tensor, places: Tensor) -> None:
        """Keeps tokens that do not go on."""
        self.states = torch.cat([self.states, states])
        self.stopped = torch.cat([self.stopped, places])

    def revive(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the wanted ones out again: states and places."""
        back = torch.isin(self.stopped, wanted)
        found = self.states[back], self.stopped[back]
        self.states, self.stopped = self.states[~back], self.stopped[~back]
        return found

    def begin(self, new: Tensor, wanted: Tensor) -> None:
        """Says which tokens the next update brings, and which it hands out."""
        self.step = new, wanted

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds tokens in their places; returns those that are wanted."""
        super().update(key_states, value_states)
        new, wanted = self.step
        del self.step  # or its tensors would count as held
        self.places, order = torch.cat([self.places, new]).sort()
        if not bool((order[1:] > order[:-1]).all()):
            self.keys, self.values = self.keys[:, :, order], self.values[:, :, order]
        return self.read(wanted)

    def read(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of held tokens."""
        if len(wanted) == len(self.places):
            return self.keys, self.values
        rows = torch.isin(self.places, wanted)
        return self.keys[:, :, rows], self.values[:, :, rows]


class LazyModel(nn.Module):
    """A model whose later layers read a share of the tokens; its weights are the source's own.

    Args:
        source: an ordinary causal language model.
        share: of the tokens that the last third of the layers reads.
    """

    def __init__(self, source: PreTrainedModel, share: float) -> None:
        super().__init__()
        self.source = source
        self.cuts = cuts(source.config.num_hidden_layers, share)

    @property
    def config(self) -> Any:
        """The source's."""
        return self.source.config

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.source.device

    def new_cache(self, model: PreTrainedModel, batch: int, length: int) -> Cache:
        """An empty one."""
        empty = torch.empty(0, self.config.hidden_size, dtype=self.source.dtype, device=self.device)
        layers: list[Any] = [LazyLayer(empty) for _ in range(self.config.num_hidden_layers)]
        return Cache(layers=layers)

    def forward(
        self, input_ids: Tensor, past_key_values: Cache, logits_to_keep: int = 0, **kwargs: Any
    ) -> CausalLMOutput:
        """A prompt at once, its last token's logits alone; later tokens one by one.

        Args:
            input_ids: ``[1, S]``.
            past_key_values: of ``new_cache``.
            logits_to_keep: of the last tokens; 0 for all that there are.
            **kwargs: what other models take; without padding it says nothing.
        """
        layers: Any = past_key_values.layers
        read = len(layers[0].places)
        parts = input_ids.split(1, dim=1) if read else (input_ids,)
        states = []
        for part in parts:
            states.append(self._step(part, read, past_key_values))
            read += part.shape[1]
        found = torch.cat(states)[None, -logits_to_keep:]
        decoder: Any = self.source.get_decoder()
        head: Any = self.source.get_output_embeddings()
        return CausalLMOutput(logits=head(decoder.norm(found)))

    def _step(self, ids: Tensor, read: int, cache: Cache) -> Tensor:
        """New tokens through all layers; the newest one's state ``[1, D]``."""
        decoder: Any = self.source.get_decoder()
        layers: Any = cache.layers
        hidden = decoder.embed_tokens(ids)[0]
        wanted = torch.arange(read + ids.shape[1], dtype=torch.int32, device=self.device)
        total, places = len(wanted), wanted[read:]
        for index, block in enumerate(decoder_layers(self.source)):
            own: LazyLayer = layers[index]
            states, revived = own.revive(wanted)
            places, order = torch.cat([revived, places]).sort()
            hidden = torch.cat([states, hidden])[order]
            own.begin(places, wanted)
            with SeenQueries() if index in self.cuts else nullcontext() as seen:
                hidden = self._through(block, hidden, places, wanted, cache)
            if seen is None:
                continue
            keep = kept(self.cuts[index], total)
            wanted = most_read(seen.queries[0], own.read(wanted)[0], wanted, keep, seen.scale)
            stays = torch.isin(places, wanted)
            if index + 1 < len(layers):
                layers[index + 1].stop(hidden[~stays], places[~stays])
            hidden, places = hidden[stays], places[stays]
        return hidden[-1:]

    def _through(
        self, block: Any, hidden: Tensor, places: Tensor, wanted: Tensor, cache: Cache
    ) -> Tensor:
        """Tokens ``[n, D]`` through a layer in which they see the wanted ones before them."""
        decoder: Any = self.source.get_decoder()
        positions = places.long()[None]
        mask = None
        if 1 < len(places) < len(wanted):
            unseen = wanted > places[:, None]
            mask = hidden.new_zeros(unseen.shape).masked_fill(unseen, float("-inf"))[None, None]
        out = block(
            hidden[None],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            position_embeddings=decoder.rotary_emb(hidden[None], positions),
        )
        return (out[0] if isinstance(out, tuple) else out)[0]


def most_read(
    queries: Tensor, keys: Tensor, places: Tensor, keep: int, scale: float | None
) -> Tensor:
    """The places that the newest query looks at most, all heads together, and its own.

    Args:
        queries: ``[1, H, S, d]``, the newest last.
        keys: of the tokens at ``places``, ``[1, G, n, d]``.
        places: ``[n]``, the newest last.
        keep: how many.
        scale: on the scores.
    """
    length = len(places)
    if keep >= length:
        return places
    padded = queries[:, :, -1:].expand(-1, -1, length, -1)  # only the last one counts
    newest = (torch.arange(length) == length - 1).double()
    scores = attention_scores(padded, keys, newest, scale or queries.shape[-1] ** -0.5).sum(0)
    scores[-1] = float("inf")
    return places[scores.topk(keep).indices.sort().values]


def _settings(spec: ModelSpec, budgets: Sequence[float]) -> list[Setting]:
    return [Setting(f"last third reads {100 * share:g} %", share) for share in SHARES]


@torch.no_grad()
def require_same_loop(source: PreTrainedModel, ids: Tensor) -> None:
    """Refuses models that do more between their layers than the loop here.

    Raises:
        UnsupportedModelError: the last token's log-probabilities differ.
    """
    lazy: Any = LazyModel(source, 1.0)
    cache = lazy.new_cache(lazy, 1, len(ids))
    try:
        got = lazy(ids[None], past_key_values=cache).logits[0, -1]
        wanted = source(ids[None]).logits[0, -1]
        same = bool((got.softmax(-1) - wanted.softmax(-1)).abs().max() < AGREEMENT)
    except (AttributeError, IndexError, TypeError):  # other parts, or attention unseen
        same = False
    if not same:
        raise UnsupportedModelError(
            f"{source.config.model_type} does more between its layers than a loop over them",
            remedy="leave this method out",
        )


def _lazy(bench: Bench, share: float) -> Variant:
    source = bench.source.model
    require_same_loop(source, bench.calibration_ids[0, :CHECKED])
    model: Any = LazyModel(source, share)
    return Variant(model, new_cache=model.new_cache)


METHODS = (
    Method(
        "lazyllm",
        "LazyLLM",
        "tokens",
        "arXiv 2407.14057",
        "Two cuts, after both thirds of the layers, where the authors choose layers and shares for "
        "each model; what follows the prefix is cut too, and bytes count what is kept to revive "
        "tokens.",
        _settings,
        _lazy,
    ),
)
