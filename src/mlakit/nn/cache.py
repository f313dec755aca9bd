"""LatentCache: what a converted model remembers, in pages that every decode kernel reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mlakit.errors import MlakitError, UsageError
from mlakit.ops.cache_format import PLAIN, CacheFormat, slots_of
from mlakit.spec import BLOCK_SIZE, AttentionSpec


class LatentLayer(CacheLayerMixin):
    """One layer's pages; lengths and block table live in the LatentCache, once for all layers.

    Attributes:
        pages: ``[num_blocks, P, 1, W]``, or bytes of a quantised format; a row is
            ``[c_kv | k_rope]`` of one token. Rows that no token has written hold anything.
        cache_format: how the pages hold their tokens.
        dtype: of rows that are read back.
        columns: tokens this layer has been given, padding included.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(
        self, cache: LatentCache, index: int, cache_format: CacheFormat, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.cache = cache
        self.index = index
        self.cache_format = cache_format
        self.dtype = dtype
        self.pages = self.new_pages()
        self.columns = 0
        self.is_initialized = True

    def new_pages(self) -> Tensor:
        """Pages for every entry of the block table, not initialised."""
        table = self.cache.block_table
        return self.cache_format.allocate(table.numel(), self.cache.block_size, table.device)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The pages exist from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """transformers' way in: stores S tokens and returns all T of them, padding as zeros.

        Args:
            key_states: latents ``[B, 1, S, C]``.
            value_states: rotated keys ``[B, 1, S, R]``.
            *args: unused, part of transformers' signature.
            **kwargs: likewise.

        Returns:
            Latents ``[B, 1, T, C]`` and rotated keys ``[B, 1, T, R]``, rows aligned at their end.
        """
        self.cache.append(self.index, torch.cat((key_states, value_states), dim=-1)[:, 0])
        rows = self.cache.read(self.index, self.columns).unsqueeze(1)
        rank = self.cache_format.kv_lora_rank
        return rows[..., :rank], rows[..., rank:]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the mask for ``query_length`` new tokens, and the first one's number."""
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens given so far, padding included: what transformers calls the length."""
        return self.columns

    def get_max_length(self) -> int:
        """Tokens a row can hold."""
        return self.cache.max_length

    def get_max_cache_shape(self) -> int:
        """The same, by its name before transformers 5.23."""
        return self.cache.max_length


class LatentCache(Cache):
    """Pages of ``[c_kv | k_rope]`` rows for B sequences of their own lengths.

    The layout is FlashMLA's, so one tensor serves every kernel. All pages are allocated at once
    and sequence b owns ``block_table[b]``. Padding never enters the pages: a step looks at the 2-D
    attention mask and keeps real tokens only, so left-padded prompts have their true lengths here.

    Attributes:
        block_table: page numbers ``[B, max_blocks]``, int32, the same for all layers.
        cache_seqlens: real tokens per sequence ``[B]``, int32; during a step the new ones too.
        positions: position of each new token of the running step ``[B, S]``; 0 for padding.

    Args:
        specs: one latent AttentionSpec per layer.
        batch_size: B.
        max_length: tokens a sequence can hold.
        dtype: the model's own; of the pages too where a spec has no ``cache_format``.
        device: where the pages live.
        block_size: P, tokens per page.

    Raises:
        UsageError: a layer caches keys and values, or a size is below 1.
    """

    layers: list[LatentLayer]  # type: ignore[assignment]

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        batch_size: int,
        max_length: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        block_size: int = BLOCK_SIZE,
    ) -> None:
        if min(batch_size, max_length, block_size) < 1:
            raise UsageError(
                f"a cache of {batch_size} sequences of {max_length} tokens in pages of "
                f"{block_size} cannot be made",
                remedy="every size must be at least 1",
            )
        if any(spec.kv_lora_rank is None for spec in specs):
            raise UsageError(
                "a LatentCache holds latents, and this model caches keys and values",
                remedy="convert the model first, or use mlakit.nn.hf.new_cache",
            )
        self.max_length = max_length
        self.block_size = block_size
        self.block_table = self._new_table(batch_size, device)
        plain = next(name for name, numbers in PLAIN.items() if numbers == dtype)
        layers: list[Any] = []
        for index, spec in enumerate(specs):
            rank = spec.kv_lora_rank or 0
            how = CacheFormat(spec.cache_format or plain, rank, spec.cache_width - rank)
            layers.append(LatentLayer(self, index, how, dtype))
        super().__init__(layers=layers)
        self.reset()

    def _new_table(self, batch_size: int, device: torch.device | str) -> Tensor:
        blocks = -(-self.max_length // self.block_size)
        pages = torch.arange(batch_size * blocks, dtype=torch.int32, device=device)
        return pages.view(batch_size, blocks)

    @property
    def pages(self) -> list[Tensor]:
        """The pages of each layer."""
        return [layer.pages for layer in self.layers]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the pages of all layers."""
        return sum(pages.untyped_storage().nbytes() for pages in self.pages)

    @property
    def nbytes_per_token(self) -> int:
        """Bytes that one token of one sequence takes in all layers together."""
        return sum(layer.cache_format.bytes_per_token for layer in self.layers)

    @property
    def batch_size(self) -> int:
        """Sequences, B."""
        return self.block_table.shape[0]

    def reset(self) -> None:
        """Forgets every token; the pages keep their memory."""
        self.lengths = [0] * self.batch_size
        self.columns = 0
        self.cache_seqlens = torch.zeros(
            self.batch_size, dtype=torch.int32, device=self.block_table.device
        )
        for layer in self.layers:
            layer.columns = 0

    def begin_step(self, batch: int, length: int, attention_mask: Tensor | None = None) -> None:
        """Plans where S new tokens of every sequence go, once for all layers.

        Args:
            batch: sequences in the input; must be B.
            length: S, columns of the input.
            attention_mask: ``[B, >= S]``, its last S columns for the new tokens: 1 for a token,
                0 for padding, which is not stored. All tokens by default.

        Raises:
            MlakitError: another batch size, no room, a mask of another shape, or padding to the
                right of new tokens that continue older ones.
        """
        kept = self._new_tokens(batch, length, attention_mask)
        counts = [length] * batch if kept is None else kept.sum(dim=1).tolist()
        lengths = [old + new for old, new in zip(self.lengths, counts, strict=True)]
        if max(lengths) > self.max_length:
            raise MlakitError(
                f"sequence {lengths.index(max(lengths))} has {max(lengths)} tokens and the cache "
                f"was made for max_length={self.max_length}",
                remedy="make the cache longer, or generate fewer tokens",
            )
        past, device = self.cache_seqlens.long().unsqueeze(1), self.block_table.device
        if kept is None:
            offsets = torch.arange(length, device=device).expand(batch, -1)
        else:
            offsets = kept.cumsum(dim=1) - 1
        self.positions = (past + offsets).clamp_min_(0)
        slots = slots_of(self.block_table, self.positions, self.block_size).flatten()
        self._kept = None if kept is None else kept.flatten().nonzero().squeeze(1)
        self._step_slots = slots if self._kept is None else slots[self._kept]
        self.lengths = lengths
        self.columns += length
        self.cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)

    def _new_tokens(self, batch: int, length: int, attention_mask: Tensor | None) -> Tensor | None:
        """Which of the new columns hold tokens ``[B, S]``, or None for all of them."""
        if batch != self.batch_size:
            raise MlakitError(
                f"the cache was made for {self.batch_size} sequences, the input has {batch}",
                remedy="make a cache of that batch size",
            )
        if attention_mask is None:
            return None
        if attention_mask.dim() != 2 or attention_mask.shape[1] < length:
            raise MlakitError(
                f"a LatentCache needs an attention mask of {batch} rows and at least {length} "
                f"columns, not one of shape {tuple(attention_mask.shape)}",
                remedy="pass the tokenizer's own 2-D mask",
            )
        kept = attention_mask[:, -length:].to(self.block_table.device).bool()
        if bool(kept.all()):
            return None
        if self.columns and bool((kept[:, 1:] < kept[:, :-1]).any()):
            raise MlakitError(
                "tokens that continue a cached text are padded on the right",
                remedy="pad on the left: tokenizer.padding_side = 'left'",
            )
        return kept

    def append(self, layer_idx: int, rows: Tensor) -> None:
        """Stores the new tokens of a layer; the first layer of an unplanned step plans it.

        Args:
            layer_idx: the layer.
            rows: ``[B, S, W]``, ``[c_kv | k_rope]`` of each token.
        """
        layer = self.layers[layer_idx]
        if layer.columns == self.columns:
            self.begin_step(*rows.shape[:2])
        flat = rows.flatten(0, 1)
        if self._kept is not None:
            flat = flat[self._kept]
        layer.cache_format.append(layer.pages, self._step_slots, flat)
        layer.columns = self.columns

    def stored(self, layer_idx: int, rows: Tensor) -> Tensor:
        """The new tokens of a layer as every later step will read them.

        Args:
            layer_idx: the layer.
            rows: ``[B, S, W]``, as they were appended.

        Returns:
            ``[B, 1, S, W]``; padding as it came, and plain numbers too.
        """
        layer = self.layers[layer_idx]
        if layer.cache_format.kind in PLAIN:
            return rows.unsqueeze(1)
        held = layer.cache_format.read(layer.pages, self._step_slots, rows.dtype)
        flat = rows.flatten(0, 1)
        held = held if self._kept is None else flat.index_copy(0, self._kept, held)
        return held.view_as(rows).unsqueeze(1)

    def read(self, layer_idx: int, count: int) -> Tensor:
        """The last ``count`` tokens of every sequence ``[B, count, W]``, zeros where it is shorter.

        Sequences end at the last column, so a column has the same distance from the end in all.
        """
        layer = self.layers[layer_idx]
        steps = torch.arange(-count, 0, device=self.block_table.device)
        positions = self.cache_seqlens.long().unsqueeze(1) + steps
        slots = slots_of(self.block_table, positions.clamp_min(0), self.block_size)
        rows = layer.cache_format.read(layer.pages, slots, layer.dtype)
        return rows.masked_fill(positions.unsqueeze(-1) < 0, 0)

    def visible(self, count: int, length: int, window: int | None = None) -> Tensor:
        """Which of the last ``count`` tokens the last ``length`` ones see ``[B, 1, S, count]``.

        Args:
            count: columns, as in ``read``.
            length: S, the queries, which are the last tokens themselves.
            window: a query sees this many tokens, itself included; all earlier ones by default.
        """
        device = self.block_table.device
        key = torch.arange(count - 1, -1, -1, device=device)
        query = torch.arange(length - 1, -1, -1, device=device).unsqueeze(1)
        seen = key >= query
        if window is not None:
            seen = seen & (key - query < window)
        held = key < self.cache_seqlens.long().unsqueeze(1)
        return seen & held.view(-1, 1, 1, count)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens of every sequence.

        Args:
            tokens_to_remove: minus their number; a positive value is the length to keep
                (transformers before 5.23).
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers may pass a tensor
        if tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - self.columns)
        self.columns = max(0, self.columns + tokens_to_remove)
        self.lengths = [max(0, length + tokens_to_remove) for length in self.lengths]
        self.cache_seqlens = (self.cache_seqlens + tokens_to_remove).clamp_min(0)
        for layer in self.layers:
            layer.columns = self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence b becomes a copy of the old sequence ``beam_idx[b]``."""
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence becomes ``repeats`` neighbouring copies; allocates new pages."""
        rows = torch.arange(self.batch_size, device=self.block_table.device)
        self._take(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these sequences only; allocates new pages."""
        rows = torch.arange(self.batch_size, device=self.block_table.device)
        self._take(rows[indices.to(rows.device)])

    def _take(self, rows: Tensor) -> None:
        rows = rows.to(self.block_table.device)
        old, resized = self.block_table, len(rows) != self.batch_size
        if resized:
            self.block_table = self._new_table(len(rows), old.device)
        used = -(-max(self.lengths) // self.block_size)
        source = old[rows, :used].flatten().long()
        target = self.block_table[:, :used].flatten().long()
        for layer in self.layers:
            held = layer.pages[source]
            if resized:
                layer.pages = layer.new_pages()
            layer.pages[target] = held
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        self.cache_seqlens = self.cache_seqlens[rows]
