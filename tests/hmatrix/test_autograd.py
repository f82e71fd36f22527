"""torch differentiates products, solutions and log-determinants."""

import gc
import weakref

import numpy as np
import pytest
import torch

import hmatrix as hm
from tests.helpers import condition
from tests.hmatrix.differentiated import CASES, DOUBLES, build, draw_case, random_parts
from tests.strategies import mlr_matrix


@pytest.fixture(params=CASES, ids=str)
def case(request, rng):
    return draw_case(rng, *request.param)


def test_products_and_solutions_have_gradients(case):
    tree, parts, symmetric, b = case

    def product(b, *parts):
        return build(tree, parts, symmetric) @ b

    def adjoint_product(b, *parts):
        return build(tree, parts, symmetric).rmatmat(b)

    def solution(b, *parts):
        return hm.factorize(build(tree, parts, symmetric), 0.3).solve(b)

    def adjoint_solution(b, *parts):
        F = hm.factorize(build(tree, parts, symmetric))
        return F.solve(b, adjoint=True, rtol=1e-12)

    for function in (product, adjoint_product, solution, adjoint_solution):
        assert torch.autograd.gradcheck(function, (b, *parts), fast_mode=True)


def test_determinants_and_diagonals_have_gradients(case):
    tree, parts, symmetric, _ = case

    def log_determinant(*parts):
        return hm.factorize(build(tree, parts, symmetric)).slogdet()[1]

    def inverse_diagonal(*parts):
        return hm.factorize(build(tree, parts, symmetric)).inverse_diagonal()

    def diagonal(*parts):
        return build(tree, parts, symmetric).diagonal()

    for function in (log_determinant, inverse_diagonal, diagonal):
        assert torch.autograd.gradcheck(function, parts, fast_mode=True)


def test_the_gradient_of_the_log_determinant_is_the_inverse(case):
    """d log|det A| = tr(A⁻¹ dA), so the gradient is A⁻ᴴ, as of a dense matrix."""
    tree, parts, symmetric, _ = case
    H = build(tree, parts, symmetric)
    value = hm.factorize(H).slogdet()[1]
    assert (value.shape, value.dtype) == ((), torch.float64)
    gradients = torch.autograd.grad(value, parts)
    D = build(tree, parts, symmetric).to_dense()
    inverse = torch.linalg.inv(D).mH.detach()
    assert value.item() == pytest.approx(torch.linalg.slogdet(D)[1].item(), rel=1e-13)
    # the chain rule from A⁻ᴴ on to the parts, through the dense form alone
    expected = torch.autograd.grad(D, parts, grad_outputs=inverse)
    tolerance = 1e-13 * condition(D.detach().numpy())
    for found, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)


def test_orthogonal_elimination_has_gradients(case):
    tree, parts, symmetric, b = case

    def factored(parts):
        return hm.factorize(build(tree, parts, symmetric), 0.3, method="orthogonal")

    def solution(b, *parts):
        return factored(parts).solve(b)

    def adjoint_solution(b, *parts):
        return factored(parts).solve(b, adjoint=True)

    for function in (solution, adjoint_solution):
        assert torch.autograd.gradcheck(function, (b, *parts), fast_mode=True)
    value = factored(parts).slogdet()[1]
    D = build(tree, parts, symmetric).to_dense() + 0.3 * torch.eye(tree.n)
    gradients = torch.autograd.grad(value, parts)
    expected = torch.autograd.grad(
        D, parts, grad_outputs=torch.linalg.inv(D).mH.detach()
    )
    for found, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-8)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(factored(parts).slogdet()[1], parts, create_graph=True)


def test_the_diagonal_of_an_orthogonal_inverse_has_gradients(case, rng):
    tree, parts, symmetric, _ = case
    H = build(tree, parts, symmetric)
    found = hm.factorize(H, 0.3, method="orthogonal").inverse_diagonal()
    D = build(tree, parts, symmetric).to_dense() + 0.3 * torch.eye(tree.n)
    expected = torch.linalg.inv(D).diagonal()
    torch.testing.assert_close(found, expected)
    weights = torch.asarray(rng.standard_normal(tree.n)).to(found.dtype)
    if found.is_complex():
        weights = weights * (0.6 + 0.8j)
    gradients, exact = (
        torch.autograd.grad(x, parts, weights) for x in (found, expected)
    )
    for one, other in zip(gradients, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_what_inversion_fails_on_is_differentiated_orthogonally():
    A = torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    A = torch.kron(A, torch.eye(8).double())
    H = hm.from_dense(A, levels=2)
    H = hm.HODLR(H.tree, H.leaves.requires_grad_(), H.upper, H.lower)
    F = hm.factorize(H)
    x = F.solve(torch.ones(16, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(x.sum(), [H.leaves])
    # d (1ᵀ A⁻¹ b) = −(A⁻ᵀ 1)ᵀ dA (A⁻¹ b), in the diagonal blocks
    y, z = torch.linalg.solve(A.T, torch.ones_like(x)), x.detach()
    exact = torch.stack(
        [-torch.outer(y[i : i + 4], z[i : i + 4]) for i in (0, 4, 8, 12)]
    )
    torch.testing.assert_close(gradient, exact)
    with pytest.raises(ValueError, match="no gradients"):
        hm.inverse(H)


@pytest.mark.parametrize("method", ["inversion", "orthogonal", "cholesky", None])
def test_padded_rows_have_no_gradients(method):
    """Steps along those of a log-determinant would fill them."""
    H = mlr_matrix(13, 2, 0)
    if method:
        H = hm.from_dense(H.to_dense(), levels=2)
    H = H.to(like=torch.empty(0).double()).map(lambda x: x.clone().requires_grad_())
    F = hm.factorize(H, 0.3, method=method or "auto")
    x = F.solve(torch.ones(13).double())
    (F.logdet() + F.inverse_diagonal().sum() + x.sum()).backward()
    padded = torch.from_numpy(H.tree.rows >= 13).reshape(H.leaves.shape[:2])
    assert not H.leaves.grad[padded].any()
    assert not H.leaves.grad.mT[padded].any()


@pytest.mark.parametrize("sign", [1, -1])
def test_mlr_matrices_have_gradients(sign, rng):
    tree = hm.ClusterTree(11, 2)
    m = tree.leaf_size
    leaves = torch.asarray(rng.standard_normal((4, m, m)))
    # a padded row of a factor is zero, and so is its gradient
    factors = [torch.zeros(2**k, tree.size(k), 2).double() for k in range(2)]
    for F in factors:
        F.view(12, 2)[:11] = 0.3 * torch.asarray(rng.standard_normal((11, 2)))
    parts = [x.requires_grad_() for x in (leaves, *factors)]
    b = torch.asarray(rng.standard_normal(11)).requires_grad_()

    def inverted(leaves, *factors):
        definite = leaves @ leaves.mT / m + 3 * torch.eye(m).double()
        return hm.factorize(hm.MLR(tree, definite, factors, sign), 0.1)

    functions = [
        lambda b, *parts: inverted(*parts).solve(b),
        lambda b, *parts: inverted(*parts).sample(b),
        lambda b, *parts: inverted(*parts).whiten(b),
        lambda b, *parts: inverted(*parts).logdet() * b[0],
        lambda b, *parts: inverted(*parts).inverse_diagonal() + b,
    ]
    for function in functions:
        assert torch.autograd.gradcheck(function, (b, *parts), fast_mode=True)


def test_blocks_of_unequal_or_no_rank_have_finite_gradients():
    """Zero columns fill up the ranks of a level; nothing may divide by their norms."""
    tree, U = hm.ClusterTree(7, 2), torch.zeros(2, 2, 2).double()
    U[0, :, 0] = 1.0
    top = torch.zeros(1, 4, 0).double()
    blocks = (
        hm.LowRank(top, torch.zeros(1, 0).double(), top),
        hm.LowRank(U.requires_grad_(), 0.1 * torch.ones(2, 2).double(), U),
    )
    leaves = (2 * torch.eye(2).double()).repeat(4, 1, 1)
    leaves[3, 1, 1] = 0  # padding
    leaves.requires_grad_()
    F = hm.factorize(hm.HODLR(tree, leaves, blocks))
    total = F.logdet() + F.solve(torch.ones(7).double()).sum()
    for gradient in torch.autograd.grad(total, (U, leaves)):
        assert torch.isfinite(gradient).all()
        assert gradient.any()


def test_log_determinants_are_numbers_where_no_gradient_is_wanted(rng):
    tree, parts = random_parts(rng, "float64", symmetric=True)
    H = build(tree, parts, symmetric=True)
    assert isinstance(hm.factorize(H).logdet(), torch.Tensor)
    with torch.no_grad():
        F = hm.factorize(H)
        assert type(F.logdet()) is float
    fixed = build(tree, [part.detach() for part in parts], symmetric=True)
    assert [type(x) for x in hm.factorize(fixed).slogdet()] == [float, float]
    # and the symmetric factor is there again
    assert isinstance(F, type(hm.factorize(fixed, method="cholesky")))


@pytest.fixture(params=DOUBLES)
def definite(request, rng):
    """Parts of a Hermitian positive definite matrix, and right-hand sides."""
    tree, parts = random_parts(rng, request.param, True, n=11, levels=2)
    b = torch.asarray(rng.standard_normal((tree.n, 2))).to(parts[0].dtype)
    return tree, parts, b.requires_grad_()


def factorized(tree, parts, method="cholesky"):
    """Factorize with zeros in the padded rows of all parts."""
    real = torch.asarray(tree.rows < tree.n).double()
    leaves, *factors = parts
    blocks = real.reshape(leaves.shape[:2])
    parts = [leaves * blocks[:, :, None] * blocks[:, None, :]]
    for level in range(tree.levels):
        U, S, V = factors[3 * level : 3 * level + 3]
        halves = real.reshape(2**level, 2, -1, 1)
        parts += [U * halves[:, 0], S, V * halves[:, 1]]
    return hm.factorize(build(tree, parts, True), 0.3, method=method)


def test_symmetric_factorizations_have_gradients(definite):
    tree, parts, b = definite
    functions = [
        lambda b, *parts: factorized(tree, parts).solve(b),
        lambda b, *parts: factorized(tree, parts).solve(b, refine=2, adjoint=True),
        lambda b, *parts: factorized(tree, parts).inverse() @ b,
        lambda b, *parts: factorized(tree, parts).logdet() * abs(b[0, 0]),
        lambda b, *parts: factorized(tree, parts).inverse_diagonal() * b[:, 0],
    ]
    for function in functions:
        assert torch.autograd.gradcheck(function, (b, *parts), fast_mode=True)


def test_they_are_those_of_block_inversion(definite):
    tree, parts, b = definite

    def gradients(method):
        F = factorized(tree, parts, method)
        loss = F.logdet() + abs((b.conj() * F.solve(b)).sum())
        return torch.autograd.grad(loss, (b, *parts))

    for found, expected in zip(*map(gradients, ("cholesky", "inversion")), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_gradients_of_what_has_no_levels_or_no_rank(rng):
    A = torch.asarray(rng.standard_normal((6, 6)))
    A = (A @ A.mT + torch.eye(6)).requires_grad_()
    for tree, upper in (
        (hm.ClusterTree(6, 0), ()),
        (
            hm.ClusterTree(6, 1),
            (hm.LowRank(*(torch.zeros(1, *s, 0).double() for s in ((3,), (), (3,)))),),
        ),
    ):
        m = tree.leaf_size
        leaves = torch.stack([A[i : i + m, i : i + m] for i in range(0, 6, m)])
        F = hm.factorize(hm.HODLR(tree, leaves, upper), method="cholesky")
        value = F.logdet() + F.solve(torch.ones(6).double()).sum()
        blocks = torch.block_diag(*leaves)
        exact = torch.logdet(blocks) + torch.linalg.inv(blocks).sum()
        found, expected = (
            torch.autograd.grad(x, A, retain_graph=True)[0] for x in (value, exact)
        )
        torch.testing.assert_close(found, expected)


def test_samples_and_whitening_have_gradients_to_vectors(definite):
    tree, parts, b = definite
    with pytest.raises(ValueError, match=r"W has gradients to vectors alone"):
        factorized(tree, parts).whiten(b)
    F = factorized(tree, [part.detach() for part in parts])
    for function in (F.sample, F.whiten, F.solve, lambda b: F.inverse() @ b):
        assert torch.autograd.gradcheck(function, (b,), fast_mode=True)


def test_second_derivatives_are_refused_not_wrong(definite):
    tree, parts, b = definite
    for value in (
        factorized(tree, parts).logdet(),
        factorized(tree, parts).solve(b).real.sum(),
    ):
        with pytest.raises(RuntimeError, match=r"differentiated once.*inversion"):
            torch.autograd.grad(value, parts[0], create_graph=True)


def test_a_likelihood_leaves_no_graph_behind(definite):
    """The factorization and its log-determinant must not hold each other."""
    tree, parts, b = definite
    references = []
    gc.disable()
    try:
        for _ in range(2):
            F = factorized(tree, parts)
            (F.logdet() + F.solve(b).real.sum()).backward()
            references.append(weakref.ref(F))
            del F
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()


def test_stored_inverses_have_gradients_or_say_so(rng):
    A = rng.standard_normal((40, 40))
    A[:20, :20] = 1e-7 * A[:20, :20] + np.outer(A[:20, 0], A[0, :20])
    for D, regular in ((A, False), (A + 20 * np.eye(40), True)):
        H = hm.from_dense(torch.asarray(D), leaf_size=10, rtol=0)
        leaves = H.leaves.clone().requires_grad_()
        H = hm.HODLR(H.tree, leaves, H.upper, H.lower)
        if regular:
            (found,) = torch.autograd.grad(hm.inverse(H).diagonal().sum(), leaves)
            X = np.linalg.inv(D)
            exact = [-(X @ X).T[i : i + 10, i : i + 10] for i in range(0, 40, 10)]
            np.testing.assert_allclose(found, exact, atol=1e-12)
        else:
            with pytest.raises(ValueError, match="ill-conditioned matrix has no grad"):
                hm.inverse(H)


@pytest.mark.parametrize("dtype", DOUBLES)
def test_numbers_that_want_gradients_get_them(dtype, rng):
    """Where a matrix has no gradients, a product with one used to be detached silently."""
    tree, parts = random_parts(rng, dtype, symmetric=True)
    H = build(tree, [part.detach() for part in parts], symmetric=True)
    b = torch.asarray(rng.standard_normal(tree.n)).to(H.dtype)
    numbers = torch.tensor([2.0, 3.0]).double().requires_grad_()

    def loss(factor, added, symmetric):
        G = hm.shift(factor * H, added)
        assert G.symmetric == symmetric
        F = hm.factorize(G)
        return F.slogdet()[1] + abs(b @ F.solve(b))

    def dense_loss(factor, added):
        A = factor * H.to_dense() + added * torch.eye(tree.n).double()
        return torch.linalg.slogdet(A)[1] + abs(b @ torch.linalg.solve(A, b))

    for change in (lambda x: x, lambda x: (1 + 2j) * x):
        if dtype == "float64" and change(1) != 1:
            continue
        changed = change(numbers)
        found, exact = (
            torch.autograd.grad(value, numbers, retain_graph=True)[0]
            for value in (loss(*changed, change(1) == 1), dense_loss(*changed))
        )
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=0)


def test_factors_of_a_semidefinite_matrix_have_gradients():
    stream = hm.StreamingMLR(8, 1, 2, like=torch.empty(0).double())
    stream.update(torch.arange(24).double().reshape(3, 8))
    M = stream.result()
    factor = torch.tensor(2.0).double().requires_grad_()
    (found,) = torch.autograd.grad((factor * M).diagonal().sum(), factor)
    assert float(found) == pytest.approx(M.trace(), rel=1e-14)


def test_traces_are_numbers_without_gradients():
    """torch warns, once, where a number is made of a tensor that wants gradients."""
    stream = hm.StreamingMLR(8, 1, 2, like=torch.empty(0).double())
    factor = torch.tensor(2.0).double().requires_grad_()
    torch.set_warn_always(True)
    try:
        for M in (hm.identity(8, like=factor), hm.shift(stream.result(), 1.0)):
            assert (factor * M).trace() == 16.0
    finally:
        torch.set_warn_always(False)


def test_numbers_whose_gradients_would_be_lost_are_refused():
    H = hm.identity(8, levels=1, like=torch.empty(0).double())
    number = torch.tensor(2.0).double().requires_grad_()
    with pytest.raises(hm.DTypeError, match="`shift` wants a gradient"):
        hm.factorize(H, shift=number)
    with pytest.raises(hm.BackendError, match="`factor` is a torch array"):
        hm.scale(hm.identity(8, levels=1), number)
    with pytest.raises(hm.DTypeError, match="`factor` has dtype float32"):
        hm.scale(H, number.float())
    with torch.no_grad():
        assert hm.factorize(H, shift=number).shift == 2.0


def test_diagonals_of_ill_conditioned_definite_inverses_have_gradients(rng):
    """Block inversion, whose steps have gradients, loses their digits."""
    t = np.sort(rng.random(200))
    A = np.exp(-(((t[:, None] - t) / 0.2) ** 2)) + 1e-6 * np.eye(200)
    H = hm.from_dense(torch.asarray(A), leaf_size=50, rtol=1e-15)
    leaves = H.leaves.clone().requires_grad_()
    F = hm.factorize(hm.HODLR(H.tree, leaves, H.upper), method="cholesky")
    F.inverse_diagonal().sum().backward()
    X = np.linalg.inv(A)  # d tr(X) = −tr(X dA X)
    exact = -(X @ X).reshape(4, 50, 4, 50)[range(4), :, range(4), :]
    error = np.linalg.norm(leaves.grad.numpy() - exact)
    assert error <= 1e-5 * np.linalg.norm(exact)


def test_gradients_of_an_ill_conditioned_log_determinant_are_those_of_its_factor():
    """By elimination, from the stored inverse, they have no digits left."""
    t = torch.sort(
        torch.rand(127, generator=torch.Generator().manual_seed(0)).double()
    )[0]
    K = torch.exp(-50 * (t[:, None] - t) ** 2) + 1e-9 * torch.eye(127).double()
    H = hm.from_dense(K, levels=1, rtol=1e-14)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    shifted = 1e-10 * torch.eye(127).double()
    F = hm.factorize(hm.shift(scale * H, 1e-10))
    (found,) = torch.autograd.grad(F.logdet(), scale)
    value = torch.logdet(scale * H.to_dense() + shifted)
    (expected,) = torch.autograd.grad(value, scale)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    with pytest.raises(hm.ToleranceError, match=r"no more digits .* use a `shift`"):
        F.inverse_diagonal().sum().backward()
