"""In which order the gradients of logical ranks are added: along one fixed binary tree, whoever adds. Pure.

The leaves are the logical ranks 0 .. L - 1. A node [first, last) is the sum of its two halves, the left one of which has the largest power
of two of leaves that leaves some for the right one. A rank computes neighbouring leaves, adds up those nodes that lie wholly in its
part, and the rest of the tree is added by whoever needs the sum. So the additions are the same for any number of ranks; only where they
happen differs (EasyScale, Li et al. 2022, keeps the order of an all-reduce in the same spirit).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

Node = tuple[int, int]  # [first, last) of the logical ranks
T = TypeVar("T")


def owned(rank: int, world_size: int, leaves: int) -> range:
    """The logical ranks that a rank computes: numbers differ by one at most; none where there are more ranks than leaves."""
    return range(leaves * rank // world_size, leaves * (rank + 1) // world_size)


def halves(node: Node) -> tuple[Node, Node]:
    """Of a node of two leaves or more."""
    first, last = node
    middle = first + (1 << (last - first - 1).bit_length() - 1)
    return (first, middle), (middle, last)


def nodes_within(part: range, leaves: int) -> list[Node]:
    """The largest nodes of the tree that lie wholly in `part`, from left to right: together they are all of it."""

    def descend(node: Node) -> Iterator[Node]:
        if part.start <= node[0] and node[1] <= part.stop:
            yield node
        elif node[0] < part.stop and part.start < node[1]:
            for half in halves(node):
                yield from descend(half)

    return list(descend((0, leaves))) if part else []


def add_up(node: Node, find: Callable[[Node], T | None], add: Callable[[T, T], T]) -> T:
    """The sum at `node`: what `find` knows of it, or else the sums of its halves, added. Left before right; leaves must be found."""
    found = find(node)
    if found is not None:
        return found
    left, right = halves(node)
    return add(add_up(left, find, add), add_up(right, find, add))
