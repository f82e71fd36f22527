"""What is kept of objects by their identity."""

from __future__ import annotations

import gc

import torch

from sylva_train._identity import ByIdentity


def test_values_belong_to_objects_not_to_what_these_are_equal_to():
    found: ByIdentity[str] = ByIdentity()
    one, other = torch.zeros(2), torch.zeros(2)
    found[one] = "one"
    assert (found.get(one), found.get(other)) == ("one", None)
    found[one] = "again"
    assert (found.get(one), len(found)) == ("again", 1)


def test_values_go_with_their_objects():
    found: ByIdentity[int] = ByIdentity()
    for number in range(100):
        # Where the one before was in memory, most likely.
        x = torch.zeros(2)
        assert found.get(x) is None
        found[x] = number
        found[x] = -number
        del x
        gc.collect(0)
        assert not len(found)


def test_a_tensor_that_autograd_alone_keeps_is_still_known():
    found: ByIdentity[int] = ByIdentity()
    x = torch.ones(3, requires_grad=True)
    kept = x * 2
    y = kept * kept
    found[kept] = 1
    del kept
    assert found.get(y.grad_fn._saved_self) == 1
    del y
    gc.collect()
    assert not len(found)
