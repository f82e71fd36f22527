"""PyTorch's threads: what is set for small matrices, and what others may have set."""

import os
import subprocess
import sys

import pytest

#: Largest logarithm of an orthogonal matrix's determinant, of several at once.
LARGEST = """
import numpy as np, torch, hmatrix as hm
X = torch.linalg.qr(torch.randn(4, 288, 288, dtype=torch.float64))[0]
largest = lambda: float(torch.linalg.slogdet(X)[1].abs().max())
"""


def run(code):
    """Run code by itself, with two threads; each line that it prints is a number."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", LARGEST + code],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    # MKL writes its errors to the same place
    return [float(line) for line in done.stdout.split("\n") if line and line[0] != "I"]


def test_pytorchs_own_decompositions_stay_right():
    """Once setting the number of threads made those of several matrices wrong."""
    found = run(
        """
t = torch.linspace(0, 1, 300, dtype=torch.float64)
H = hm.from_kernel(lambda x, y: torch.exp(-abs(x - y)), t, nugget=0.1, leaf_size=20)
hm.factorize(H), hm.factorize(H, method="inversion"), hm.truncate(H + H, max_rank=3)
print(torch.get_num_threads())
print(largest())
"""
    )
    assert found[0] == 2
    assert found[1] < 1e-10


@pytest.mark.parametrize(
    ("before", "mkls"), [("pass", 0), ("torch.set_num_threads(2)", 2)]
)
def test_small_matrices_take_one_thread_whoever_set_them(before, mkls):
    """Two wait for each other at every few columns: on a machine that has other work."""
    inside, after, local = run(
        f"""
from hmatrix._backend.threads import _mkl, one_thread_if_small
if not torch.backends.mkl.is_available():
    _mkl = lambda: lambda _: {mkls}
{before}
with one_thread_if_small(X[:, :40, :40]):
    print(torch.get_num_threads())
print(torch.get_num_threads())
print(_mkl()(0))
"""
    )
    assert (inside, after, local) == (1, 2, mkls)


@pytest.mark.parametrize(
    ("method", "levels", "rank"), [("inversion", 2, 120), ("orthogonal", 4, 60)]
)
def test_decompositions_are_right_whoever_sets_the_number_of_threads(
    method, levels, rank
):
    (error, logdet, sign) = run(
        f"""
torch.set_num_threads(2)
A = np.random.default_rng(0).standard_normal((1536, 1536)) / 30
A[np.arange(1536), np.arange(1536)] += 3
H = hm.from_dense(torch.from_numpy(A), levels={levels}, max_rank={rank})
D = H.to_dense().numpy()
F = hm.factorize(H, method={method!r})
x = np.linspace(0, 1, 1536)
exact = np.linalg.solve(D, x)
print(np.linalg.norm(F.solve(torch.from_numpy(x)).numpy() - exact) / np.linalg.norm(exact))
found, expected = F.slogdet(), np.linalg.slogdet(D)
print(float(found[1]) - expected[1])
print(float(found[0]) * expected[0])
"""
    )
    assert error < 1e-9
    assert abs(logdet) < 1e-6
    assert sign == 1
