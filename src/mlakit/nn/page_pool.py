"""PagePool: one set of pages for many sequences, of which every step feeds some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mlakit.errors import MlakitError
from mlakit.nn.cache import LatentCache
from mlakit.spec import BLOCK_SIZE, AttentionSpec


class PagePool(LatentCache):
    """A LatentCache whose sequences are named anew at every step, by the pages they lie in.

    Which page belongs to whom is the caller's business; two sequences may share pages that no
    step writes to.

    Args:
        specs: one latent AttentionSpec per layer.
        num_blocks: pages in every layer.
        dtype: as for a LatentCache.
        device: where the pages live.
        block_size: P, tokens per page.

    Raises:
        UsageError: a layer caches keys and values, or a size is below 1.
    """

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        num_blocks: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        block_size: int = BLOCK_SIZE,
    ) -> None:
        super().__init__(
            specs, num_blocks, block_size, dtype=dtype, device=device, block_size=block_size
        )
        self.num_blocks = num_blocks

    def select(self, tables: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        """Names the sequences of the next step.

        Args:
            tables: the pages of each of B sequences, with room for the tokens to come.
            lengths: tokens that each of them has already.
        """
        device, longest = self.block_table.device, max(map(len, tables))
        rows = [[*table, *[0] * (longest - len(table))] for table in tables]
        self.block_table = torch.tensor(rows, dtype=torch.int32, device=device)
        self.max_length = longest * self.block_size
        self.lengths = list(lengths)
        self.cache_seqlens = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        self.columns = max(lengths)
        for layer in self.layers:
            layer.columns = self.columns

    @torch.inference_mode()
    def feed(
        self,
        model: Any,
        tables: Sequence[Sequence[int]],
        lengths: Sequence[int],
        tokens: Sequence[Sequence[int]],
    ) -> Tensor:
        """Feeds new tokens of B sequences to a model, however many of each.

        Args:
            model: the model whose pages these are.
            tables: as for ``select``.
            lengths: likewise.
            tokens: the new ones of each sequence, at least one. Shorter ones are padded on the
                left; padding enters no page.

        Returns:
            Logits ``[B, vocabulary]`` after the last token of each sequence.
        """
        self.select(tables, lengths)
        ids = torch.zeros(len(tokens), max(map(len, tokens)), dtype=torch.long)
        kept, positions = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, (past, new) in enumerate(zip(lengths, tokens, strict=True)):
            ids[row, -len(new) :] = torch.tensor(new)
            positions[row, -len(new) :] = torch.arange(past, past + len(new))
            kept[row, -len(new) :] = 1
        output = model(
            input_ids=ids.to(model.device),
            attention_mask=None if bool(kept.all()) else kept.to(model.device),
            position_ids=positions.to(model.device),
            past_key_values=self,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _take(self, rows: Tensor) -> None:
        raise MlakitError(
            "the sequences of a pool cannot be copied or reordered",
            remedy="make a LatentCache for beams",
        )
