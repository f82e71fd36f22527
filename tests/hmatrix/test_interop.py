import numpy as np
import pytest
from scipy import sparse
from scipy.sparse.linalg import cg, gmres, svds

import hmatrix as hm
from tests.helpers import assert_close, dense, to_numpy
from tests.strategies import make_samples


# SciPy 1.18 wants `matmat` for these in time, and its older solvers pass them on.
@pytest.mark.filterwarnings("ignore:Calling `r?matvec` on 'column:FutureWarning")
def test_it_is_the_operator_scipy_expects(xp, dtype, rng):
    H = hm.from_dense(rng.standard_normal((20, 20)), levels=2, max_rank=3)
    H = H.to(like=xp.asarray(np.empty(0)), dtype=dtype)
    operator, D = hm.aslinearoperator(H), dense(H)
    x, X = (
        rng.standard_normal(20).astype(dtype),
        rng.standard_normal((20, 3)).astype(dtype),
    )
    assert operator.dtype == dtype
    assert_close(operator @ x, D @ x, (dtype, "exact"))
    assert_close(operator @ X, D @ X, (dtype, "exact"))
    assert_close(operator.matvec(x[:, None]), D @ x[:, None], (dtype, "exact"))
    assert_close(operator.H @ x, D.T @ x, (dtype, "exact"))
    assert_close(operator.T @ X, D.T @ X, (dtype, "exact"))
    assert_close(operator.rmatvec(x[:, None]), D.T @ x[:, None], (dtype, "exact"))


def test_complex_vectors_keep_their_imaginary_parts(rng):
    H = hm.from_dense(rng.standard_normal((20, 20)), levels=2)
    operator, D = hm.aslinearoperator(H), dense(H)
    X = rng.standard_normal((20, 3)) + 1j * rng.standard_normal((20, 3))
    for x in (X, X[:, 0]):
        np.testing.assert_allclose(operator @ x, D @ x, rtol=1e-12)
        np.testing.assert_allclose(operator.H @ x, D.T @ x, rtol=1e-12)


def count_steps(solver, A, b, **options):
    """Return the number of iterations, and the solution."""
    steps = []
    x, info = solver(A, b, rtol=1e-10, callback=steps.append, **options)
    assert info == 0
    return len(steps), x


def test_the_inverse_preconditions(rng):
    stream = hm.StreamingMLR(200, 3, 8)
    X = make_samples("walk", 400, 200, rng)
    stream.update(X)
    A, b = X.T @ X / 400 + 1e-2 * np.eye(200), rng.standard_normal(200)
    M = hm.aslinearoperator(hm.factorize(stream.result(), 1e-2).inverse())
    plain, _ = count_steps(cg, A, b)
    steps, x = count_steps(cg, A, b, M=M)
    assert steps < plain / 2
    assert_close(x, np.linalg.solve(A, b), ("float64", "solve"), 1e6)


@pytest.mark.parametrize("rtol", [1e-1, 1e-2, 1e-3])
def test_a_loose_factorization_preconditions_the_exact_matrix(rtol, rng):
    t = np.sort(rng.random(300))
    A = np.exp(-abs(t[:, None] - t)) + 1e-2 * np.eye(300)
    b = rng.standard_normal(300)
    plain, _ = count_steps(cg, A, b)
    H = hm.from_dense(A, levels=3, rtol=rtol, definite=True)
    M = hm.aslinearoperator(hm.factorize(H, method="cholesky").inverse())
    steps, x = count_steps(cg, A, b, M=M)
    assert steps < plain / 2
    assert_close(A @ x, b, ("float64", "solve"), 1e5)


def test_a_loose_general_one_too(rng):
    t = np.linspace(0, 1, 300)
    A = np.exp(-((t[:, None] - t) ** 2)) * (1 + t) + np.triu(np.ones((300, 300))) / 9
    A, b = A + np.eye(300), rng.standard_normal(300)
    options = {"callback_type": "pr_norm", "restart": 300}
    plain, _ = count_steps(gmres, A, b, **options)
    H = hm.from_dense(A, levels=3, rtol=1e-2)
    assert H.error > 0
    M = hm.aslinearoperator(hm.factorize(H).inverse())
    steps, x = count_steps(gmres, A, b, M=M, **options)
    assert steps < plain / 2
    assert_close(A @ x, b, ("float64", "solve"), 1e5)


def arrays_of(H):
    blocks = (*H.upper, *(H.lower or ()))
    return [H.leaves, *(part for b in blocks for part in (b.U, b.S, b.V))]


def address(x):
    return x.data_ptr() if hasattr(x, "data_ptr") else x.__array_interface__["data"][0]


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_libraries_share_the_memory_of_the_host(dtype, rng):
    import torch

    A = rng.standard_normal((20, 20)).astype(dtype)
    H = hm.from_dense(A, levels=2, max_rank=3)
    T = H.to(like=torch.empty(0), dtype=dtype)
    N = T.to(like=np.empty(0), dtype=dtype)
    for x, y, z in zip(arrays_of(H), arrays_of(T), arrays_of(N), strict=True):
        assert isinstance(y, torch.Tensor)
        assert isinstance(z, np.ndarray)
        assert address(x) == address(y) == address(z)
    T.leaves[0, 0, 0] = 7
    assert H.leaves[0, 0, 0] == N.leaves[0, 0, 0] == 7
    other = "float64" if dtype == "float32" else "float32"
    if "complex" not in dtype:
        copy = H.to(like=torch.empty(0), dtype=other)
        assert address(copy.leaves) != address(H.leaves)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_libraries_share_the_memory_of_a_device(dtype, rng):
    import torch

    cupy = pytest.importorskip("cupy")
    A = rng.standard_normal((20, 20)) + 1j * rng.standard_normal((20, 20))
    A = (A if "complex" in dtype else A.real).astype(dtype)
    H = hm.from_dense(cupy.asarray(A), levels=2, rtol=0)
    T = H.to(like=torch.empty(0, device="cuda"), dtype=dtype)
    assert T.leaves.data_ptr() == H.leaves.data.ptr
    back = T.to(like=cupy.empty(0), dtype=dtype)
    assert back.leaves.data.ptr == H.leaves.data.ptr
    # adjoints of torch are views that conjugate when they are read
    for other in (cupy.empty(0), np.empty(0)):
        N = T.H.to(like=other, dtype=dtype)
        error = abs(to_numpy(N.to_dense()) - A.conj().T).max()
        assert error < 1e3 * np.finfo(dtype).eps


def test_what_cannot_be_shared_is_copied(rng):
    """torch has neither read-only arrays nor negative strides."""
    import torch

    leaves = rng.standard_normal((1, 4, 4))
    leaves.flags.writeable = False
    for array in (leaves, leaves[:, ::-1]):
        H = hm.HODLR(hm.ClusterTree(4, 0), array, ())
        T = H.to(like=torch.empty(0), dtype="float64")
        T.leaves[:] = 0
        assert abs(H.leaves).min() > 0


def test_reversed_arrays_of_a_device_are_copied_for_torch(monkeypatch, rng):
    """A negative stride ends the process in `torch.from_dlpack`."""
    import array_api_compat.torch
    import torch

    cupy = pytest.importorskip("cupy")
    if hasattr(cupy, "stand_in"):
        take = array_api_compat.torch.from_dlpack

        def checked(x):
            assert min(x.strides) > 0
            return take(x._a)

        monkeypatch.setattr(torch.Tensor, "__dlpack_device__", lambda _: (2, 0))
        monkeypatch.setattr(array_api_compat.torch, "from_dlpack", checked)
    leaves = rng.standard_normal((1, 4, 4))
    H = hm.HODLR(hm.ClusterTree(4, 0), cupy.asarray(leaves)[:, ::-1, :], ())
    device = "cpu" if hasattr(cupy, "stand_in") else "cuda"
    T = H.to(like=torch.empty(0, device=device), dtype="float64")
    np.testing.assert_array_equal(to_numpy(T.leaves), leaves[:, ::-1])


def test_negated_views_are_handed_over(rng):
    """Those that torch negates when it reads them: imaginary parts of conjugates."""
    import torch

    A = torch.asarray(rng.standard_normal((8, 8)) + 1j * rng.standard_normal((8, 8)))
    leaf = A.mH.imag[None, ...]
    assert leaf.is_neg()
    H = hm.HODLR(hm.ClusterTree(8, 0), leaf, ())
    N = H.to(like=np.empty(0), dtype="float64")
    np.testing.assert_array_equal(N.to_dense(), -A.numpy().imag.T)


def test_adjoint_views_are_handed_over(rng):
    import torch

    A = torch.asarray(
        rng.standard_normal((20, 20)) + 1j * rng.standard_normal((20, 20))
    )
    H = hm.from_dense(A, levels=2, rtol=0).H
    N = H.to(like=np.empty(0), dtype="complex128")
    np.testing.assert_allclose(N.to_dense(), A.numpy().conj().T, atol=1e-13)


def test_singular_values_come_out(rng):
    H = hm.from_dense(rng.standard_normal((40, 40)), levels=2, max_rank=2)
    top = svds(hm.aslinearoperator(H), k=3, return_singular_vectors=False, rng=rng)
    exact = np.linalg.svd(dense(H), compute_uv=False)[:3]
    np.testing.assert_allclose(np.sort(top)[::-1], exact)


def test_only_operators_are_wrapped():
    with pytest.raises(TypeError, match="`H` must be an Operator, got ndarray"):
        hm.aslinearoperator(np.eye(3))
    F = hm.factorize(hm.from_dense(np.eye(3), levels=1))
    with pytest.raises(TypeError, match=r"pass `H\.inverse\(\)`"):
        hm.aslinearoperator(F)


def test_sparse_matrices_multiply_from_the_left(rng):
    t = np.sort(rng.random(60))
    A, S = np.exp(-abs(t[:, None] - t)), sparse.random_array((9, 60), rng=rng)
    H = hm.from_dense(A, levels=2, rtol=1e-12)
    assert np.allclose(S.tocsr() @ H, S.toarray() @ A)
    assert np.ndim(H) == 2


@pytest.mark.parametrize("size", [1e-40, 1e40])
def test_a_single_precision_operator_takes_double_vectors_of_any_size(xp, size, rng):
    """A preconditioner of float32 would make zeros of 1e-40, and infinity of 1e40."""
    A = np.exp(-abs(np.subtract.outer(range(60), range(60))) / 9) + np.eye(60) / 9
    H = hm.from_dense(xp.asarray(A.astype(np.float32)), levels=2)
    operator, X = hm.aslinearoperator(H), rng.standard_normal((60, 3))
    X *= size * np.asarray([1, 1e-9, 0])  # each column has its own
    for x in (X, X[:, 1], X + 1j * X[:, ::-1]):
        y = operator @ x
        assert y.dtype == np.result_type(x, np.float64)
        # its squares are numbers
        assert_close(y / size, A @ (x / size), ("float32", "exact"), 10)
    M = hm.aslinearoperator(hm.factorize(H).inverse())
    steps, x = count_steps(cg, A, X[:, 0], M=M)
    assert steps < 10
    assert_close(A @ (x / size), X[:, 0] / size, ("float64", "solve"), 1e6)


def test_dense_arrays_are_never_views(xp, rng):
    H = hm.from_dense(xp.asarray(rng.standard_normal((8, 8))), levels=1)
    block = hm.LowRank(*(xp.asarray(rng.random(s)) for s in ((4, 2), (2,), (3, 2))))
    for matrix in (H, block):
        with pytest.raises(ValueError, match="always a new one"):
            np.asarray(matrix, copy=False)
        np.testing.assert_array_equal(np.asarray(matrix, copy=True), dense(matrix))
        assert np.asarray(matrix, dtype="float32").dtype == "float32"


def test_division_is_by_numbers(xp, dtype, rng):
    A = rng.standard_normal((8, 8))
    H = hm.from_dense(xp.asarray(A.astype(dtype)), levels=1)
    assert_close(dense(H / 4), A / 4, (dtype, "exact"))
    with pytest.raises(ZeroDivisionError):
        H / 0


def test_a_complex_inverse_has_an_adjoint_and_no_transpose(rng):
    A = rng.standard_normal((8, 8)) + 1j * rng.standard_normal((8, 8))
    inverse = hm.factorize(hm.from_dense(A, levels=1)).inverse()
    operator = hm.factorize(hm.from_dense(A @ A.conj().T, levels=1, symmetric=True))
    assert_close(dense(inverse.H), np.linalg.inv(A).conj().T, ("float64", "solve"))
    with pytest.raises(hm.DTypeError, match="its adjoint `H`"):
        _ = operator.inverse().T
