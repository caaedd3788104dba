"""Dependency trees of tokens: the tree that carries the most of what children send to parents."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

MODES = ("arborescence", "argmax")


@dataclass
class DependencyTree:
    """Which token depends on which.

    Attributes:
        parents: Parent of every token (N); -1 for the root.
        root: The token that all others depend on.
        weights: (N, N); entry [j, i] is how much child i sends to parent j.
        messages: How much every token sends at last (N); tokens that were pruned, when they were.
        kept: Tokens that were never pruned, in order.
        grid_size: Rows and columns of tokens; token n stands in row n // columns.
    """

    parents: np.ndarray
    root: int
    weights: np.ndarray
    messages: np.ndarray
    kept: np.ndarray
    grid_size: tuple[int, int]

    @cached_property
    def children(self) -> list[list[int]]:
        """Children of every token, in order."""
        children: list[list[int]] = [[] for _ in self.parents]
        for child, parent in enumerate(self.parents.tolist()):
            if parent >= 0:
                children[parent].append(child)
        return children

    def subtree(self, token: int) -> list[int]:
        """`token` and all that depend on it, in order."""
        found, waiting = {token}, [token]
        while waiting:
            new = [child for child in self.children[waiting.pop()] if child not in found]
            found.update(new)
            waiting += new
        return sorted(found)

    @property
    def subtrees(self) -> dict[int, list[int]]:
        """The :meth:`subtree` of every child of the root, the largest first."""
        return self.parts(0)

    def parts(self, count: int) -> dict[int, list[int]]:
        """The image in parts: :attr:`subtrees`, the largest cut into those of its children until there are enough.

        Args:
            count: Parts that are enough. A cut can make more; a tree can have fewer.

        Returns:
            Tokens of every part by its topmost token, the largest part first. The root and tokens above a cut belong
            to no part.
        """
        parts = {child: self.subtree(child) for child in self.children[self.root]}
        while parts and len(parts) < count:
            top = max(parts, key=lambda token: len(parts[token]))
            if len(parts.pop(top)) == 1:
                parts[top] = [top]
                break
            parts |= {child: self.subtree(child) for child in self.children[top]}
        return dict(sorted(parts.items(), key=lambda item: -len(item[1])))

    @property
    def is_tree(self) -> bool:
        """Whether all tokens depend on the root; parents taken by ``argmax`` may form cycles instead."""
        return len(self.subtree(self.root)) == len(self.parents)

    @property
    def score(self) -> float:
        """Sum of what the children send to their parents."""
        children = np.flatnonzero(self.parents >= 0)
        return float(self.weights[self.parents[children], children].sum())


def strongest_parents(weights: np.ndarray, root: int) -> np.ndarray:
    """The parent that every child sends the most to, itself left out.

    Args:
        weights: (N, N); entry [j, i] is the weight of parent j for child i.
        root: The token without a parent.

    Returns:
        Parents (N), -1 for the root. They may form cycles.
    """
    weights = np.array(weights, dtype=np.float64)
    np.fill_diagonal(weights, -np.inf)
    parents = weights.argmax(axis=0)
    parents[root] = -1
    return parents


def _find_cycle(parents: np.ndarray, nodes: np.ndarray) -> list[int]:
    """Nodes of a cycle, or an empty list."""
    walk = np.full(len(parents), -1)  # in which walk a node was met first
    for start in nodes.tolist():
        node = start
        while node >= 0 and walk[node] < 0:
            walk[node] = start
            node = int(parents[node])
        if node >= 0 and walk[node] == start:
            cycle, other = [node], int(parents[node])
            while other != node:
                cycle.append(other)
                other = int(parents[other])
            return cycle
    return []


def maximum_arborescence(weights: np.ndarray, root: int) -> np.ndarray:
    """The tree towards `root` with the largest sum of weights (Chu and Liu; Edmonds).

    As long as the strongest parents form a cycle, it is contracted to one node; entering it costs what the child that
    is entered there gives up.

    Args:
        weights: (N, N); entry [j, i] is the weight of parent j for child i. The diagonal is ignored.
        root: The token without a parent.

    Returns:
        Parents (N), -1 for the root.
    """
    n = len(weights)
    score = np.array(weights, dtype=np.float64)
    np.fill_diagonal(score, -np.inf)
    score[:, root] = -np.inf
    # Between contracted nodes an entry stands for one edge between tokens: the one that gives it its score.
    edge_parent, edge_child = (np.broadcast_to(x, (n, n)).copy() for x in (np.arange(n)[:, None], np.arange(n)))
    members = [{i} for i in range(n)]
    nodes = np.arange(n)
    contracted: list[tuple[int, list[tuple[int, set[int], tuple[int, int]]]]] = []
    while True:
        parents = np.full(n, -1)
        below = nodes[nodes != root]
        parents[below] = nodes[score[np.ix_(nodes, below)].argmax(axis=0)]
        cycle = _find_cycle(parents, nodes)
        if not cycle:
            break
        inside = np.array(cycle)
        up = parents[inside]
        edges = list(zip(edge_parent[up, inside].tolist(), edge_child[up, inside].tolist()))
        node = cycle[0]
        contracted.append((node, [(i, members[i], edge) for i, edge in zip(cycle, edges)]))
        entering = score[:, inside] - score[up, inside]
        entered = inside[entering.argmax(axis=1)]
        leaving = inside[score[inside].argmax(axis=0)]
        every = np.arange(n)
        column = (entering.max(axis=1), edge_parent[every, entered], edge_child[every, entered])
        row = (score[leaving, every], edge_parent[leaving, every], edge_child[leaving, every])
        for table, into, out in zip((score, edge_parent, edge_child), column, row):
            table[:, node], table[node] = into, out
        score[node, node] = -np.inf
        members[node] = set().union(*(members[i] for i in cycle))
        nodes = nodes[~np.isin(nodes, inside[1:])]
    chosen = {i: (int(edge_parent[parents[i], i]), int(edge_child[parents[i], i])) for i in below.tolist()}
    for node, cycle_edges in reversed(contracted):
        entry = chosen.pop(node)
        for i, tokens, edge in cycle_edges:
            chosen[i] = entry if entry[1] in tokens else edge
    result = np.full(n, -1)
    for parent, child in chosen.values():
        result[child] = parent
    return result
