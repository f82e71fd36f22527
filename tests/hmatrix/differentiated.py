"""Matrices whose parts want gradients, for the tests of torch's differentiation."""

import torch

import hmatrix as hm

DOUBLES = ("float64", "complex128")
#: dtypes, and whether the matrix is Hermitian
CASES = [(dtype, symmetric) for dtype in DOUBLES for symmetric in (False, True)]


def random_parts(rng, dtype, symmetric, *, n=12, levels=2, rank=2):
    """A tree and leaf tensors of a well-conditioned HODLR matrix, all with gradients."""
    tree = hm.ClusterTree(n, levels, permutation=rng.permutation(n))

    def draw(*shape):
        x = torch.asarray(rng.standard_normal(shape))
        if dtype == "complex128":
            x = x + 1j * torch.asarray(rng.standard_normal(shape))
        return x

    m = tree.leaf_size
    leaves = draw(tree.nodes(levels), m, m)
    if symmetric:
        leaves = leaves + leaves.mH
    parts = [leaves + 60 * torch.eye(m)]
    for _ in range(1 if symmetric else 2):
        for k in range(levels):
            shape = (tree.nodes(k), tree.size(k + 1), rank)
            scales = 0.5 + torch.asarray(rng.random((tree.nodes(k), rank)))
            parts += [draw(*shape), scales, draw(*shape)]
    return tree, [part.detach().requires_grad_() for part in parts]


def build(tree, parts, symmetric):
    """Put the matrix together; a Hermitian one has Hermitian leaves."""
    leaves, *rest = parts
    blocks = [hm.LowRank(*rest[i : i + 3]) for i in range(0, len(rest), 3)]
    upper, lower = tuple(blocks[: tree.levels]), tuple(blocks[tree.levels :])
    if symmetric:
        return hm.HODLR(tree, (leaves + leaves.mH) / 2, upper)
    return hm.HODLR(tree, leaves, upper, lower)


def draw_case(rng, dtype, symmetric):
    """A tree, the parts of a matrix on it, whether it is Hermitian, and two vectors."""
    tree, parts = random_parts(rng, dtype, symmetric)
    b = torch.asarray(rng.standard_normal((tree.n, 2))).to(parts[0].dtype)
    return tree, parts, symmetric, b.requires_grad_()
