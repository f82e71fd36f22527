"""Products of float32 are made of all of its bits, whatever torch may do elsewhere."""

import threading
from itertools import chain

import pytest
import torch

import hmatrix as hm
from tests.helpers import error_ratio

BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def settings():
    return [x.fp32_precision for x in BACKENDS]


@pytest.fixture(params=["high", "medium", "cuda", "mkldnn"])
def rounding(request):
    """Allow TF32 or bfloat16, for all products or for those of a backend."""
    before = settings()
    if request.param in ("high", "medium"):
        torch.set_float32_matmul_precision(request.param)
    elif request.param == "cuda":
        BACKENDS[0].fp32_precision = "tf32"
    else:
        BACKENDS[1].fp32_precision = "bf16"
    assert not {"tf32", "bf16"}.isdisjoint(settings())
    yield
    torch.set_float32_matmul_precision("highest")
    for x, value in zip(BACKENDS, before, strict=True):
        x.fp32_precision = value


@pytest.mark.usefixtures("rounding")
def test_products_are_not_rounded_and_the_setting_comes_back():
    A, seen, before = torch.eye(40) + torch.ones(40, 40) / 40, [], settings()

    def matvec(x):
        seen.append(settings())
        return A @ x

    def fails(x):
        raise KeyError

    hm.from_matvec(matvec, n=40, symmetric=True, like=A, levels=2)
    with pytest.raises(KeyError):
        hm.from_matvec(fails, n=40, symmetric=True, like=A, levels=2)
    assert seen
    assert {"tf32", "bf16"}.isdisjoint(chain(*seen))
    assert settings() == before


@pytest.mark.usefixtures("rounding")
def test_who_leaves_first_takes_nothing_from_another_thread():
    A, seen, before = torch.eye(40), [], settings()
    inside, done = threading.Event(), threading.Event()

    def slow(x):
        inside.set()
        assert done.wait(60)
        seen.append(settings())
        return A @ x

    def build(matvec):
        return hm.from_matvec(matvec, n=40, symmetric=True, like=A, levels=1)

    thread = threading.Thread(target=build, args=(slow,))
    thread.start()
    assert inside.wait(60)
    build(lambda x: A @ x)
    done.set()
    thread.join()
    assert {"tf32", "bf16"}.isdisjoint(chain(*seen))
    assert settings() == before


@pytest.mark.gpu
@pytest.mark.usefixtures("rounding")
def test_digits_are_kept_on_a_device():
    t = torch.linspace(0, 1, 512, device="cuda")
    A = torch.exp(-abs(t[:, None] - t)) + torch.eye(512, device="cuda")
    exact = A.double()
    H = hm.from_dense(A, levels=2, rtol=1e-6)
    assert error_ratio(H.to_dense(), exact) < 2e-6
    assert error_ratio(H @ A, exact @ exact) < 1e-5
    assert error_ratio(hm.factorize(H).solve(A), torch.eye(512)) < 1e-4
