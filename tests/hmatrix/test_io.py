import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import hmatrix as hm
from tests.helpers import assert_in, dense, error_ratio, to_numpy


def matrices(rng):
    A = rng.standard_normal((21, 21))
    stream = hm.StreamingMLR(21, 2, 3)
    stream.update(rng.standard_normal((30, 21)))
    return {
        "general": hm.from_dense(A, levels=2, max_rank=3),
        "symmetric": hm.from_dense(A + A.T, levels=2, max_rank=3),
        "zero": hm.from_dense(np.zeros((21, 21)), levels=2),
        "leaf": hm.from_dense(A, levels=0),
        "mlr": stream.result(),
        "inverse": hm.factorize(stream.result(), 1.0).inverse(),
    }


@pytest.fixture(params=["general", "symmetric", "zero", "leaf", "mlr", "inverse"])
def H(request, rng):
    return matrices(rng)[request.param]


def test_what_is_saved_comes_back(xp, dtype, H, tmp_path):
    H = H.to(like=xp.asarray(np.empty(0)), dtype=dtype)
    path = tmp_path / "H.safetensors"
    hm.save(path, H)
    back = hm.load(path)
    assert type(back) is type(H)
    assert repr(back) == repr(H.to(like=np.empty(0), dtype=dtype))
    assert np.array_equal(dense(back.to(like=H.leaves)), dense(H))
    assert getattr(back, "error", None) == getattr(H, "error", None)
    assert_in(hm.load(str(path), like=H.leaves).leaves, H.leaves)


def test_a_file_is_replaced_whole(H, tmp_path):
    path = tmp_path / "H.safetensors"
    path.write_text("something older")
    hm.save(path, H)
    hm.load(path)
    assert [p.name for p in tmp_path.iterdir()] == ["H.safetensors"]


def test_whoever_may_read_other_files_may_read_these(tmp_path):
    other, path = tmp_path / "other", tmp_path / "H.safetensors"
    other.touch()
    hm.save(path, hm.identity(4))
    assert path.stat().st_mode == other.stat().st_mode


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    H = hm.from_dense(np.eye(4), levels=1)
    path = tmp_path / "H.safetensors"
    hm.save(path, H)
    before = path.read_bytes()

    def fail(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        hm.save(path, hm.scale(H, 2.0))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["H.safetensors"]


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_truncated_files_are_refused(length, tmp_path):
    path = tmp_path / "H.safetensors"
    hm.save(path, hm.from_dense(np.eye(10), levels=1))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(hm.FileFormatError, match="truncated, or no safetensors"):
        hm.load(path)


@pytest.mark.parametrize("tree", [None, hm.ClusterTree(40, 2, None, range(40)[::-1])])
def test_a_wrong_bit_is_found(tree, tmp_path, rng):
    path = tmp_path / "H.safetensors"
    options = {"levels": 2} if tree is None else {"tree": tree}
    hm.save(path, hm.from_dense(rng.standard_normal((40, 40)), **options))
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for place in rng.integers(start, len(data), 100):
        wrong = bytearray(data)
        wrong[place] ^= 1 << rng.integers(8)
        path.write_bytes(wrong)
        with pytest.raises(hm.FileFormatError, match="the numbers that were written"):
            hm.load(path)
    # an array by another name would be one that is not there
    path.write_bytes(data.replace(b'"upper.0.S":{', b'"upper.0.T":{'))
    with pytest.raises(hm.FileFormatError, match="damaged: KeyError"):
        hm.load(path)


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({"weight": np.ones(3)}, path)
    with pytest.raises(hm.FileFormatError, match="holds no hierarchical matrix"):
        hm.load(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        hm.load(tmp_path / "missing")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": "2"}, "format version 2, this program reads version 1"),
        ({"kind": "H2"}, "damaged: ValueError: unknown kind 'H2'"),
        ({"header": "{}"}, "damaged: KeyError: 'n'"),
        ({"header": "[]"}, "damaged: (TypeError|AttributeError)"),
        ({"header": '{"complex": ["scalar"]}'}, "damaged: "),
        ({"header": "nonsense"}, "damaged: JSONDecodeError"),
        ({"header": '{"n": 10, "levels": 2, "sign": 1}'}, "damaged: KeyError"),
        ({"header": '{"n": 12, "levels": 1, "sign": 1}'}, "damaged: ShapeError"),
    ],
)
def test_tampered_files_are_refused(change, match, tmp_path):
    path = tmp_path / "H.safetensors"
    metadata = {
        "format": "hmatrix",
        "version": "1",
        "kind": "MLR",
        "header": '{"n": 10, "levels": 1, "sign": 1}',
    }
    arrays = {"leaves": np.ones((2, 5, 5)), "factors.0": np.ones((1, 10, 2))}
    arrays["scalar"] = np.ones(())
    safetensors.numpy.save_file(arrays, path, metadata={**metadata})
    assert hm.load(path).tree.n == 10
    safetensors.numpy.save_file(arrays, path, metadata={**metadata, **change})
    with pytest.raises(hm.FileFormatError, match=match):
        hm.load(path)


def test_only_matrices_are_saved(tmp_path):
    with pytest.raises(TypeError, match="must be a HODLR or MLR or Factorization, got"):
        hm.save(tmp_path / "x", np.eye(3))


def factorizations(n, rng, is_complex):
    """Every kind of factorization, of a permuted and uneven tree."""
    sizes = np.array([n // 3, 0, n // 4, n - n // 3 - n // 4])
    tree = hm.ClusterTree(n, 2, sizes, rng.permutation(n))
    A = rng.standard_normal((n, n))
    if is_complex:
        A = A + 1j * rng.standard_normal((n, n))
    S = (A + A.conj().T) / 2 + 4 * np.sqrt(n) * np.eye(n)
    stream = hm.StreamingMLR(tree, rank=3, like=A)
    stream.update(A)
    return {
        "inversion": (hm.from_dense(A, tree=tree, max_rank=4), "inversion"),
        "orthogonal": (hm.from_dense(A, tree=tree, max_rank=4), "orthogonal"),
        "hermitian": (hm.from_dense(S, tree=tree, max_rank=4), "inversion"),
        "cholesky": (hm.from_dense(S, tree=tree, max_rank=4), "cholesky"),
        "mlr": (stream.result(), "auto"),
    }


@pytest.mark.parametrize(
    "kind", ["inversion", "orthogonal", "hermitian", "cholesky", "mlr"]
)
@pytest.mark.parametrize("is_complex", [False, True])
def test_a_factorization_comes_back_bit_for_bit(
    xp, dtype, kind, is_complex, rng, tmp_path
):
    n = 53
    H, method = factorizations(n, rng, is_complex)[kind]
    if is_complex:
        dtype = {"float32": "complex64", "float64": "complex128"}[dtype]
    H = H.to(like=xp.asarray(np.empty(0)), dtype=dtype)
    F = hm.factorize(H, 0.25, method=method)
    path = tmp_path / "F.safetensors"
    hm.save(path, F)
    G = hm.load(path, like=H.leaves)
    assert repr(G) == repr(F)
    assert (type(G), G.shift, G.tree) == (type(F), F.shift, F.tree)
    b = xp.asarray(rng.standard_normal((n, 3)), dtype)
    assert_in(G.solve(b), b)

    def same(x, y):
        return np.array_equal(to_numpy(x), to_numpy(y))

    assert same(G.solve(b), F.solve(b))
    assert same(G.solve(b[:, 0]), F.solve(b[:, 0]))
    assert same(G.solve(b, adjoint=True), F.solve(b, adjoint=True))
    assert same(G.inverse_diagonal(), F.inverse_diagonal())
    # without a step of refinement that the one that was saved does not need
    assert same(G.inverse() @ b, F.inverse() @ b)
    assert G.slogdet() == F.slogdet()
    if kind in ("cholesky", "mlr"):
        assert same(G.sample(b), F.sample(b))
        assert same(G.whiten(b), F.whiten(b))
    on_host = hm.load(path).solve(to_numpy(b))
    assert error_ratio(on_host, F.solve(b)) < 1e-4


def test_a_factorization_that_does_not_fit_its_matrix_is_refused(tmp_path, rng):
    path = tmp_path / "F.safetensors"
    for H, method in factorizations(40, rng, is_complex=False).values():
        F = hm.factorize(H, 10.0, method=method)
        hm.save(path, F)
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(metadata["header"])
        del header["crc32"]  # with it nothing of this would come that far
        metadata["header"] = json.dumps(header)
        own = [name for name in arrays if name.startswith("factorization.")]
        assert len(own) > 2
        for name in own:
            smaller = arrays | {
                name: arrays[name][:0] if arrays[name].ndim else np.ones(1)
            }
            safetensors.numpy.save_file(smaller, path, metadata=metadata)
            with pytest.raises(hm.FileFormatError, match="damaged: ShapeError"):
                hm.load(path)
            lacking = {key: x for key, x in arrays.items() if key != name}
            safetensors.numpy.save_file(lacking, path, metadata=metadata)
            with pytest.raises(hm.FileFormatError, match="damaged: KeyError"):
                hm.load(path)


def test_a_factorization_of_the_wrong_matrix_is_refused(tmp_path, rng):
    path = tmp_path / "F.safetensors"
    F = hm.factorize(hm.from_dense(np.eye(10), levels=1), method="cholesky")
    hm.save(path, F)
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    safetensors.numpy.save_file(
        arrays, path, metadata=metadata | {"kind": "MLRFactorization"}
    )
    with pytest.raises(hm.FileFormatError, match="TypeError: `matrix` must be a MLR"):
        hm.load(path)
