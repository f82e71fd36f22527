"""Streaming: second moments ``Σ w zzᵀ`` held hierarchically, batch after batch.

Two accumulators with one interface. `StreamingMLR` stays positive semidefinite and
keeps the diagonal exact; `StreamingHODLR` is the hierarchical incremental SVD.
"""

from __future__ import annotations

from hmatrix.update.hodlr import StreamingHODLR
from hmatrix.update.mlr import StreamingMLR

__all__ = ["StreamingHODLR", "StreamingMLR"]
