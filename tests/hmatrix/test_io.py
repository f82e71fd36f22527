import numpy as np
import pytest
import safetensors.numpy

import hmatrix as hm
from tests.helpers import assert_in, dense


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
    safetensors.numpy.save_file(arrays, path, metadata={**metadata})
    assert hm.load(path).tree.n == 10
    safetensors.numpy.save_file(arrays, path, metadata={**metadata, **change})
    with pytest.raises(hm.FileFormatError, match=match):
        hm.load(path)


def test_only_matrices_are_saved(tmp_path):
    with pytest.raises(TypeError, match="`H` must be a HODLR or MLR, got ndarray"):
        hm.save(tmp_path / "x", np.eye(3))
