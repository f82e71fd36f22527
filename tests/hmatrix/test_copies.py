"""What goes to another process, or is copied, arrives as it was."""

import copy
import pickle

import numpy as np
import pytest

import hmatrix as hm
from tests.helpers import dense, error_ratio, to_numpy


def by_pickle(x):
    return pickle.loads(pickle.dumps(x))  # noqa: S301


@pytest.mark.parametrize("copied", [by_pickle, copy.deepcopy])
@pytest.mark.parametrize("method", ["cholesky", "inversion", "orthogonal", "mlr"])
def test_factorizations_are_copied(xp, dtype, rng, method, copied):
    x = xp.asarray(rng.standard_normal(21).astype(dtype))
    if method == "mlr":
        stream = hm.StreamingMLR(21, 2, 3, like=x)
        stream.update(x[None, :])
        F = hm.factorize(stream.result(), 1.0)
    else:
        A = rng.standard_normal((21, 21)).astype(dtype)
        H = hm.from_dense(xp.asarray(A @ A.T + np.eye(21, dtype=dtype)), levels=2)
        F = hm.factorize(H, method=method)
    back = copied(F)
    assert type(back) is type(F)
    assert back.space == F.space
    tolerance = 1e3 * F.space.eps  # strides may be others, and with them the rounding
    assert error_ratio(back.solve(x), F.solve(x)) < tolerance
    assert error_ratio(copied(F.inverse()) @ x, F.inverse() @ x) < tolerance
    if method in ("cholesky", "mlr"):
        assert error_ratio(back.sample(x), F.sample(x)) < tolerance
    assert repr(copied(F.matrix)) == repr(F.matrix)


@pytest.mark.parametrize("copied", [by_pickle, copy.deepcopy])
@pytest.mark.parametrize(
    "kind", [hm.StreamingMLR, hm.StreamingSketch, hm.StreamingHODLR]
)
def test_streams_are_copied_and_go_on(xp, dtype, rng, kind, copied):
    Z = xp.asarray(rng.standard_normal((9, 21)).astype(dtype))
    stream = kind(21, 2, 3, like=Z)
    stream.update(Z[:5, :])
    back = copied(stream)
    for s in (stream, back):
        s.update(Z[5:, :])
    tolerance = 1e3 * stream.space.eps
    assert error_ratio(dense(back.result()), dense(stream.result())) < tolerance


@pytest.mark.parametrize(
    "error",
    [
        hm.SingularLeafError("singular", 3, 5),
        hm.NotPositiveDefiniteError("not definite", 3, 5),
        hm.PrecisionError("imprecise", 0.5),
        hm.ToleranceError("missed", 1e-8, 1e-3),
        hm.ShapeError("does not fit"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_exceptions_come_from_other_processes(error):
    # one that cannot be read back breaks a pool of processes, or lets it wait for ever
    back = by_pickle(error)
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


@pytest.mark.parametrize("kind", ["general", "hermitian", "mlr"])
def test_copies_share_nothing_and_conjugates_are_those_of_all_numbers(xp, kind, rng):
    A = rng.standard_normal((21, 21)) + 1j * rng.standard_normal((21, 21))
    if kind == "mlr":
        stream = hm.StreamingMLR(21, 2, 3, dtype="complex128", like=xp.asarray(A.real))
        stream.update(xp.asarray(A))
        H = stream.result()
    else:
        A = A if kind == "general" else A + A.conj().T
        H = hm.from_dense(xp.asarray(A), levels=2)
    D = to_numpy(H.to_dense())
    assert np.array_equal(to_numpy(H.conj().to_dense()), D.conj())
    G = H.copy()
    G.leaves[...] = 0
    assert np.array_equal(to_numpy(H.to_dense()), D)
    assert repr(G) == repr(H)
