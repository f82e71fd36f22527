"""``torch.autocast`` around a model's forward does not reach into the package."""

import pytest
import torch

import hmatrix as hm
from tests.helpers import error_ratio

pytestmark = pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])


@pytest.fixture
def A(rng):
    X = torch.as_tensor(rng.standard_normal((60, 60)), dtype=torch.float32).cumsum(1)
    return X @ X.T / 60 + torch.eye(60)


@pytest.mark.parametrize(
    "kind", [hm.StreamingMLR, hm.StreamingSketch, hm.StreamingHODLR]
)
def test_streams_sum_in_their_own_dtype(kind, lower, A):
    plain, inside = (kind(60, 2, 40, like=A) for _ in range(2))
    plain.update(A)
    with torch.autocast("cpu", dtype=lower):
        inside.update(A)
        inside.merge(kind(60, 2, 40, like=A))
        found, discarded = inside.result(), inside.discarded
    assert error_ratio(found.to_dense(), plain.result().to_dense()) < 1e-5
    assert abs(discarded - plain.discarded) < 1e-3 * float(A.trace())


@pytest.mark.parametrize("method", ["cholesky", "inversion", "orthogonal"])
def test_factorizations_keep_their_digits(method, lower, A):
    H = hm.from_dense(A, levels=2, rtol=1e-6)
    F = hm.factorize(H, method=method)
    with torch.autocast("cpu", dtype=lower):
        inside = hm.factorize(hm.from_dense(A, levels=2, rtol=1e-6), method=method)
        x, diagonal = inside.solve(A[0, :]), inside.inverse_diagonal()
        inverse = hm.inverse(H).to_dense()
    assert x.dtype == torch.float32
    assert error_ratio(x, F.solve(A[0, :])) < 1e-4
    assert error_ratio(diagonal, F.inverse_diagonal()) < 1e-4
    assert error_ratio(inverse, hm.inverse(H).to_dense()) < 1e-4
    assert abs(inside.logdet() - F.logdet()) < 1e-3


def test_the_symmetric_factor_of_an_mlr_matrix_keeps_its_digits(lower, A):
    stream = hm.StreamingMLR(60, 2, 10, like=A)
    stream.update(A)
    plain, inside = (hm.factorize(stream.result(), 0.1) for _ in range(2))
    with torch.autocast("cpu", dtype=lower):
        found = inside.sample(A)  # the factor is made when it is first asked for
    assert error_ratio(found, plain.sample(A)) < 1e-5


def test_constructors_products_and_sums_keep_theirs(lower, A):
    H = hm.from_dense(A, levels=2, rtol=1e-6)
    t = torch.linspace(0, 1, 60)
    with torch.autocast("cpu", dtype=lower):
        made = [
            (hm.from_matvec(H, rtol=1e-5), A),
            (hm.from_matvec(lambda x: A @ x, n=60, symmetric=True, like=A), A),
            (
                hm.from_kernel(lambda x, y: torch.exp(-abs(x - y)), t, leaf_size=8),
                torch.exp(-abs(t[:, None] - t)),
            ),
            (hm.matmul(H, H), A.double() @ A.double()),
            (hm.add(H, H, rtol=1e-5), 2 * A),
            (hm.add_low_rank(H, t[:, None]), A + t[:, None] * t),
            (hm.truncate(H, rtol=1e-5), A),
        ]
        products = [G @ A for G, _ in made]
        norm = hm.norm(H)
        block = hm.LowRank(A[:, :3], t[:3], A[:, 3:6])
        whole = block.to_dense()
        low_rank = [block @ A, A @ block, (block @ block).to_dense()]
    D = block.U.double() * block.S @ block.V.double().T
    exact = [D, D @ A.double(), A.double() @ D, D @ D]
    for found, expected in zip([whole, *low_rank], exact, strict=True):
        assert error_ratio(found, expected) < 1e-5
    for (G, expected), product in zip(made, products, strict=True):
        assert product.dtype == torch.float32
        assert error_ratio(G.to_dense(), expected) < 1e-3
        assert error_ratio(product, expected.double() @ A.double()) < 1e-3
    assert abs(norm / torch.linalg.matrix_norm(A) - 1) < 1e-5
