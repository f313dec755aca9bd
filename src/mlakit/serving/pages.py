"""Whose page is whose: free ones, those in use, and those kept for the prefix they hold.

A full page is known by all tokens up to its end: it is a node of a tree, found from its parent by
its own P tokens, compared one by one. So a page is never taken for another, whatever a hash says.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

ROOT = 0
"""The node before every text's first page."""

Key = tuple[int, tuple[int, ...]]
"""What a page is found by: the node before it, and its tokens."""


@dataclass(frozen=True)
class Node:
    """A full page that can be shared.

    Attributes:
        number: names this node for good, while pages are used again.
        page: where its tokens lie.
    """

    number: int
    page: int


class PageLedger:
    """Counts who holds which page, and remembers what full pages hold.

    A page without a holder is free, or, once it was published, kept until its memory is wanted;
    then the one released longest ago goes first. Holders give pages back last page first, so
    within a text the later page goes first and no page stays behind without those before it.

    Args:
        count: pages.
        block_size: P, tokens per page.
    """

    def __init__(self, count: int, block_size: int) -> None:
        self.count = count
        self.block_size = block_size
        self._holders = [0] * count
        self._free = list(range(count - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._nodes: dict[Key, Node] = {}
        self._keys: dict[int, Key] = {}
        self._last = ROOT

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def kept(self) -> int:
        """Pages that nobody holds and that wait to be found or wanted."""
        return len(self._kept)

    @property
    def available(self) -> int:
        """Pages that ``take`` can give."""
        return len(self._free) + len(self._kept)

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-tokens // self.block_size)

    def take(self, count: int) -> list[int]:
        """Pages for one holder, forgetting kept ones where free ones do not suffice.

        Raises:
            ValueError: fewer are available.
        """
        if count > self.available:
            raise ValueError(f"{count} pages wanted, {self.available} available")
        while len(self._free) < count:
            page, _ = self._kept.popitem(last=False)
            del self._nodes[self._keys.pop(page)]
            self._free.append(page)
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def give_back(self, pages: Iterable[int]) -> None:
        """One holder less for each page; a text's pages in their order.

        Raises:
            ValueError: nobody holds one of them.
        """
        for page in reversed(list(pages)):
            if self._holders[page] < 1:
                raise ValueError(f"page {page} is given back and nobody holds it")
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._keys:
                self._kept[page] = None
            else:
                self._free.append(page)

    def find(self, parent: int, tokens: tuple[int, ...]) -> Node | None:
        """The page with these P tokens after those of node ``parent``, one holder more."""
        node = self._nodes.get((parent, tokens))
        if node is not None:
            self._hold(node.page)
        return node

    def publish(self, parent: int, tokens: tuple[int, ...], page: int) -> Node:
        """Makes a full page known, whose rows are never written again.

        Where another page of the same text is known already, the holder gets that one and gives
        this one back.

        Args:
            parent: node of the page before, or ``ROOT``.
            tokens: the P tokens in the page.
            page: held by the caller.

        Returns:
            The node, with the page that the caller holds now.
        """
        node = self._nodes.get((parent, tokens))
        if node is not None:
            self._hold(node.page)
            self.give_back([page])
            return node
        self._last += 1
        node = Node(self._last, page)
        self._nodes[parent, tokens] = node
        self._keys[page] = (parent, tokens)
        return node

    def _hold(self, page: int) -> None:
        self._holders[page] += 1
        self._kept.pop(page, None)
