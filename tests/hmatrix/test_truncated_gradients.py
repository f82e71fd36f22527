"""What torch differentiates is truncated with its gradients, or not at all."""

import numpy as np
import pytest
import torch

import hmatrix as hm
from tests.hmatrix.differentiated import CASES, build, draw_case


@pytest.fixture(params=CASES, ids=str)
def case(request, rng):
    return draw_case(rng, *request.param)


def test_truncated_matrices_have_gradients_or_say_so(case):
    """Those of an SVD are NaN where singular values are equal, or undefined if complex."""
    tree, parts, symmetric, b = case

    def truncated(b, *parts):
        return hm.truncate(build(tree, parts, symmetric), rtol=1e-12) @ b

    def product(b, *parts):
        H = build(tree, parts, symmetric)
        return (H @ H.T) @ b

    for function in (truncated, product):
        assert torch.autograd.gradcheck(function, (b, *parts), fast_mode=True)
    H = build(tree, parts, symmetric)
    for cut in (
        lambda: hm.truncate(H, max_rank=1),
        lambda: hm.add(H, H, rtol=1e-12),
        lambda: hm.matmul(H, H, max_rank=1),
    ):
        with pytest.raises(ValueError, match="those of what is cut off would be lost"):
            cut()
        with torch.no_grad():
            cut()


@pytest.mark.parametrize("definite", [False, True])
def test_equal_singular_values_have_gradients(definite):
    U = (torch.eye(8, dtype=torch.float64)[None, :, :3]).requires_grad_()
    block = hm.LowRank(U, torch.ones(1, 3).double(), U)
    leaves = 2 * torch.eye(8).double().expand(2, 8, 8)
    H = hm.truncate(
        hm.HODLR(hm.ClusterTree(16, 1), leaves, (block,)), definite=definite
    )
    weights = torch.arange(256).double().reshape(16, 16)
    (found,) = torch.autograd.grad((weights * H.to_dense()).sum(), U)
    both = (weights + weights.mT)[:8, 8:]
    torch.testing.assert_close(found, ((both + both.mT) @ U).detach())


def test_semidefinite_matrices_are_not_truncated_without_their_gradients():
    stream = hm.StreamingMLR(8, 1, 2, like=torch.empty(0).double())
    stream.update(torch.arange(24).double().reshape(3, 8))
    M = stream.result().map(lambda x: x.requires_grad_())
    with pytest.raises(ValueError, match="those of what is cut off would be lost"):
        hm.truncate(M, max_rank=1)
    other = hm.StreamingMLR(8, 1, 2, like=torch.empty(0).double())
    other.add_factors(M.factors)
    assert not other.result().leaves.requires_grad


def test_norms_are_numbers_without_a_warning(case):
    tree, parts, symmetric, _ = case
    H = build(tree, parts, symmetric)
    expected = torch.linalg.matrix_norm(H.to_dense(), 2).item()
    assert hm.norm(H, 2) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "levels"), [(5, 2), (13, 1), (13, 2), (14, 3), (16, 2)])
def test_full_blocks_have_gradients_whatever_the_padding(n, levels, symmetric, rng):
    """The rank of a padded block goes no further than its rows that are not padding."""
    A = rng.standard_normal((n, n)) + n * np.eye(n)
    A = torch.from_numpy(A + A.T if symmetric else A)
    fixed = hm.from_dense(A, levels=levels, rtol=1e-15, symmetric=symmetric)
    parts = [x.requires_grad_() for x in fixed._arrays().values()]
    weights = torch.from_numpy(rng.standard_normal((n, n)))

    def gradients(function, H):
        return torch.autograd.grad(
            (weights * function(H)).sum(), parts, retain_graph=True
        )

    for stored, dense in (
        (hm.truncate, torch.clone),
        (hm.inverse, torch.linalg.inv),
        (lambda H: hm.matmul(H, H), lambda A: A @ A),
    ):
        H = build(fixed.tree, parts, symmetric)
        found = gradients(torch.clone, stored(H).to_dense())
        torch.testing.assert_close(
            found, gradients(dense, H.to_dense()), rtol=1e-8, atol=1e-8
        )
