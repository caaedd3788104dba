"""Dependency trees: the best tree against exhaustive search, parts of a tree, cycles of the cheap mode."""

import itertools

import numpy as np
import pytest
import torch

from visattn.models._trees import DependencyTree, maximum_arborescence, strongest_parents


def tree(parents, weights=None):
    parents = np.array(parents)
    n = len(parents)
    root = int(np.flatnonzero(parents < 0)[0])
    weights = np.zeros((n, n)) if weights is None else weights
    return DependencyTree(parents, root, weights, np.ones(n), np.arange(n), (1, n))


def best_score(weights, root):
    """Largest score of all trees, one by one."""
    n = len(weights)
    choices = [[-1] if i == root else [j for j in range(n) if j != i] for i in range(n)]
    trees = (tree(parents, weights) for parents in itertools.product(*choices))
    return max(t.score for t in trees if t.is_tree)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_equals_exhaustive_search(n):
    for seed in range(12):
        weights = np.random.default_rng(seed).random((n, n))
        root = seed % n
        found = tree(maximum_arborescence(weights, root), weights)
        assert found.is_tree
        assert found.root == root
        assert found.score == pytest.approx(best_score(weights, root), rel=1e-12)


def test_cycles_within_cycles():
    """Two pairs that prefer themselves, which as pairs prefer each other; only a weak edge leads to the root."""
    weights = np.full((5, 5), 0.01)
    weights[1, 2] = weights[2, 1] = weights[3, 4] = weights[4, 3] = 9.0
    weights[3, 1] = weights[1, 3] = 5.0
    weights[0, 2] = 1.0
    assert strongest_parents(weights, 0).tolist() == [-1, 2, 1, 4, 3]
    best = tree(maximum_arborescence(weights, 0), weights)
    assert best.parents.tolist() == [-1, 2, 0, 1, 3]
    assert best.score == pytest.approx(best_score(weights, 0))


def test_a_large_image():
    """A grid of 20 x 20 tokens; no other tree that differs in one parent is better."""
    n = 400
    weights = np.random.default_rng(0).random((n, n)) ** 8
    found = tree(maximum_arborescence(weights, 7), weights)
    assert found.is_tree
    for child in range(0, n, 37):
        inside = set(found.subtree(child))
        if child != 7:
            outside = [j for j in range(n) if j not in inside]
            assert weights[outside, child].max() <= weights[found.parents[child], child]


def test_equal_weights_and_unused_diagonal():
    weights = np.zeros((4, 4))
    np.fill_diagonal(weights, np.nan)
    assert tree(maximum_arborescence(weights, 2)).is_tree
    assert strongest_parents(weights, 2).tolist() == [1, 0, -1, 0]


def test_parts():
    t = tree([2, 0, -1, 2, 3, 3, 0])
    assert t.children == [[1, 6], [], [0, 3], [4, 5], [], [], []]
    assert t.subtree(3) == [3, 4, 5]
    assert t.subtree(2) == list(range(7))
    assert t.subtrees == t.parts(2) == {0: [0, 1, 6], 3: [3, 4, 5]}
    assert t.parts(3) == {3: [3, 4, 5], 1: [1], 6: [6]}
    assert sorted(t.parts(9)) == [1, 4, 5, 6]
    assert tree([-1]).parts(3) == {}


def test_cycles_are_no_tree():
    t = tree([1, 0, -1, 2])
    assert not t.is_tree
    assert t.subtree(0) == [0, 1]
    assert t.subtrees == {3: [3]}


def test_sums_of_integers_stay_exact():
    weights = torch.randint(0, 9, (6, 6)).double().numpy()
    found = tree(maximum_arborescence(weights, 0), weights)
    assert found.score == best_score(weights, 0)
