"""Streaming: second moments ``Σ w zzᵀ`` held hierarchically, batch after batch.

Three accumulators with one interface. `StreamingMLR` stays positive semidefinite and
keeps the diagonal exact, and so does `StreamingSketch`, which is linear; `StreamingHODLR`
is the hierarchical incremental SVD.
"""

from __future__ import annotations

from hmatrix.update.hodlr import StreamingHODLR
from hmatrix.update.mlr import StreamingMLR
from hmatrix.update.sketch import StreamingSketch

__all__ = ["StreamingHODLR", "StreamingMLR", "StreamingSketch"]
