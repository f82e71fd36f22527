"""What arrays may be besides plain ones, and what is said of what is no array."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import sparse

import hmatrix as hm


@pytest.fixture
def A():
    t = np.linspace(0, 1, 40)
    return np.exp(-abs(t[:, None] - t)) + np.diag(t)


@pytest.mark.parametrize("kind", ["memmap", "recarray", "big-endian", "read-only"])
def test_subclasses_and_byte_orders_are_arrays_like_others(kind, A, tmp_path):
    def made(x):
        if kind == "memmap":
            x.tofile(tmp_path / "x")
            return np.memmap(tmp_path / "x", dtype=x.dtype, mode="r", shape=x.shape)
        if kind == "read-only":
            return np.broadcast_to(x, x.shape)
        return x.view(np.recarray) if kind == "recarray" else x.astype(">f8")

    x = np.cos(np.arange(40.0))
    for H in (hm.from_dense(made(A), levels=2), hm.from_dense(A, levels=2)):
        assert H.dtype == np.float64
        assert H.dtype.isnative
        np.testing.assert_allclose(H @ made(x), A @ x)
        np.testing.assert_allclose(made(x) @ H, x @ A)
        F = hm.factorize(hm.shift(H, made(x * x)))
        np.testing.assert_allclose(
            F.solve(made(x)), np.linalg.solve(A + np.diag(x * x), x)
        )
    assert hm.from_diagonal(made(x)).trace() == pytest.approx(x.sum())
    K = hm.from_kernel(lambda a, b: np.exp(-abs(a - b)), made(x))
    np.testing.assert_allclose(K, np.exp(-abs(np.subtract.outer(x, x))), atol=1e-7)


def test_what_is_masked_is_not_taken_for_numbers(A):
    masked = np.ma.masked_array(A, mask=A > 1)
    for make in (
        lambda: hm.from_dense(masked),
        lambda: hm.from_diagonal(masked[0]),
        lambda: hm.from_dense(A) @ masked[0],
        lambda: hm.StreamingMLR(40, levels=1).update(masked),
    ):
        with pytest.raises(hm.BackendError, match=r"got MaskedArray; .*`filled`"):
            make()


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_tensors_are_not_dense_ones(A, layout):
    torch = pytest.importorskip("torch")
    dense = torch.from_numpy(A)
    sparse = getattr(dense, layout)()
    for make in (
        lambda: hm.from_dense(sparse),
        lambda: hm.from_dense(dense) @ sparse,
        lambda: hm.factorize(hm.from_dense(dense), shift=100.0).solve(sparse),
        lambda: hm.StreamingMLR(40, levels=1, like=dense).update(sparse),
    ):
        with pytest.raises(hm.BackendError, match=r"layout torch\.sparse.*`to_dense`"):
            make()


def test_the_name_of_a_library_or_device_is_not_like_an_array(A, tmp_path):
    H = hm.from_dense(A, levels=2)
    hm.save(tmp_path / "H.safetensors", H)
    for make in (
        lambda like: H.to(like=like),
        lambda like: hm.load(tmp_path / "H.safetensors", like=like),
        lambda like: hm.identity(40, like=like),
        lambda like: hm.from_entries(lambda i, j: A[i, j], 40, like=like),
        lambda like: hm.from_matvec(lambda x: A @ x, n=40, like=like),
        lambda like: hm.from_sparse(sparse.csr_array(A), like=like),
        lambda like: hm.StreamingMLR(40, levels=1, like=like),
    ):
        with pytest.raises(hm.BackendError, match=r"`like` must be .* array, got str"):
            make("cuda")


WRONG = {
    "`from_sparse`": lambda given: hm.from_dense(sparse.csr_array(given.A)),
    "got int64; .* convert the array": lambda given: hm.from_dense(given.A.astype(int)),
    "has dtype int64.*; cast it[.]$": lambda given: given.H @ np.arange(40),
    "got int; `shift`": lambda given: given.H + 1,
    "got ndarray; `from_dense`": lambda given: given.H + given.A,
    "`G` .* HODLR, got ndarray; `from_dense`": lambda given: given.A - given.H,
    "`H` .* HODLR, got MLR; `from_matvec\\(M, symmetric=True": lambda given: (
        given.M - given.M
    ),
    "or MLR, got ndarray; `from_dense`": lambda given: hm.factorize(given.A),
    "a `matrix`, and `inverse[(][)]`": lambda given: given.H @ hm.factorize(given.H),
    "`hmatrix.inverse`": lambda given: given.H @ hm.factorize(given.H).inverse(),
    "got MLR; `from_matvec\\(M, symmetric=True\\)` makes": lambda given: (
        given.H + given.M
    ),
    "`H` must be a HODLR or MLR": lambda given: hm.add(given.A, given.H),
}


@pytest.mark.parametrize("words", WRONG)
def test_messages_say_what_to_do(words, A):
    M = hm.StreamingMLR(40, levels=2).result()
    given = SimpleNamespace(A=A, H=hm.from_dense(A, levels=2), M=M)
    with pytest.raises((TypeError, ValueError), match=words):
        WRONG[words](given)


@pytest.mark.parametrize(
    "act",
    [
        lambda A: hm.scale(A, 2.0),
        lambda A: hm.shift(A, 1.0),
        hm.truncate,
        lambda A: hm.matmul(A, A),
    ],
)
def test_arrays_are_no_matrices(act, A):
    with pytest.raises(
        TypeError, match=r"`H` .*, got ndarray; `from_dense` compresses"
    ):
        act(A)


def test_matrices_are_summed(A):
    H = hm.from_dense(A, levels=2)
    np.testing.assert_allclose(sum([H, H, H]), 3 * A, atol=1e-6)


def test_types_of_python_are_those_of_double_precision(xp):
    for dtype, name in ((float, "float64"), (complex, "complex128")):
        H = hm.identity(5, like=xp.asarray(np.ones(1, np.float32)), dtype=dtype)
        assert H.space.name == name


def test_tensors_that_are_negative_by_a_flag_are_read():
    """The imaginary part of a conjugate is a view that says so."""
    import torch

    t = torch.linspace(0, 1, 40, dtype=torch.float64).flip(0)
    points = torch.complex(t, -t).conj().imag
    assert points.is_neg()
    H = hm.from_kernel(lambda a, b: torch.exp(-abs(a - b)), points, rtol=1e-9)
    np.testing.assert_allclose(H, np.exp(-abs(np.subtract.outer(t, t))), atol=1e-7)
    D = hm.from_diagonal(points, levels=1)
    assert D.to(like=np.empty(0)).trace() == pytest.approx(float(t.sum()))


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_messages_name_the_wider_dtype(dtype):
    wider = {"float32": "float64", "complex64": "complex128"}[dtype]
    H = hm.from_diagonal(np.zeros(8, dtype), levels=1)
    with pytest.raises(hm.SingularLeafError, match=f"or fewer levels, or {wider}"):
        hm.factorize(H, method="inversion")
    with pytest.raises(hm.SingularLeafError, match=r"or fewer levels\.$"):
        hm.factorize(H.to(dtype=wider), method="inversion")


def test_numbers_are_not_read_out_of_strings(A):
    H, t = hm.from_dense(A, levels=2), np.linspace(0, 1, 40)
    for act in (
        lambda: hm.from_dense(A, rtol="1e-3"),
        lambda: hm.from_kernel(lambda x, y: x * y, t, nugget="1"),
        lambda: hm.truncate(H, rtol=np.str_("1e-3")),
        lambda: hm.factorize(H, "1"),
        lambda: hm.factorize(H).solve(t, rtol="1e-3"),
        lambda: hm.shift(H, "1"),
        lambda: "2" * H,
    ):
        with pytest.raises(hm.DTypeError, match=r"must be a (real )?number, got str"):
            act()


@pytest.mark.parametrize("like", [None, torch.empty(0)])
@pytest.mark.parametrize(
    ("text", "name"),
    [("f8", "float64"), ("<f4", "float32"), ("float", "float64"), ("D", "complex128")],
)
def test_dtypes_are_named_as_numpy_does(text, name, like):
    H = hm.identity(9, levels=1, like=like, dtype=text)
    assert str(H.dtype).endswith(name)
    with pytest.raises(
        hm.DTypeError, match=r"must be one of float32, .* got half-ish;"
    ):
        hm.identity(9, levels=1, dtype="half-ish")


def test_factorizations_say_how_to_solve(A):
    F, b = hm.factorize(hm.from_dense(A, levels=2)), A[0]
    for act in (lambda: F @ b, lambda: b @ F, lambda: torch.from_numpy(b) @ F):
        with pytest.raises(TypeError, match=r"`F\.solve\(b\)`"):
            act()
