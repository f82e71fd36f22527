"""`SylvaConfig`, which is PEFT's as well, and the options that do without PEFT."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig

from .options import MINILM, SylvaOptions, TaskConfig, TrainingConfig, minilm_folder

if TYPE_CHECKING:
    from .masks import Masks

__all__ = ["SylvaConfig", "SylvaType", "TaskConfig", "TrainingConfig"]


class SylvaType(str, Enum):  # noqa: UP042
    """Sylva's key in PEFT's tables, of the kind that PEFT's own `PeftType` is.

    No `enum.StrEnum`: PEFT reports the part of ``str(key)`` after the dot.
    """

    SYLVA = "SYLVA"


@dataclass
class SylvaConfig(SylvaOptions, PeftConfig):
    """What to score, how to choose blocks, and which layers to embed them in.

    A `peft.PeftConfig`, hence not frozen: PEFT itself writes to its fields.

    Parameters
    ----------
    target_modules : list of str or str
        Names or name endings of the layers, a regular expression on whole names, or
        ``"all-linear"``: every linear layer but the task's head, and those, with a
        warning, that are smaller than a block or that the loss does not reach.
    exclude_modules : list of str or str, optional
        Layers to leave out, in the same form.
    modules_to_save : list of str, optional
        Other modules to train and to save whole, the task's head above all.
    density : float
        Fraction of the blocks to train, in (0, 1]; the paper's sparsity is ``1 -
        density``.
    block_size : int
        Side of a square block of weights.
    importance : str
        Rule that scores the weights, one of `sylva_train.options.IMPORTANCES`.
    curvature : str
        For the rules that begin with ``"kfac"``, but for ``"kfac-diag"``, which has no
        need of it: Kronecker factors as positive semidefinite multilevel low rank
        (``"mlr"``), as HODLR like the paper (``"hodlr"``), or exact (``"dense"``).
    levels, rank : int
        Depth of the hierarchy and rank of its blocks; layers too small for the depth
        take fewer levels, and those that it would leave leaves of more than 2048 rows,
        as of a large vocabulary, more.
    exact_below : int
        Size from which on a factor is kept hierarchically. Smaller ones are exact, which
        takes a few megabytes.
    samples : int, optional
        Number of sequences to score with. None: where `finetune` or a comparison trains
        afterwards, a thirtieth of the sequences that training sees over all its epochs,
        at least 128 and at most 1024, so that scoring takes about a tenth of the
        training's time, or more of a short one's; 1024 where scoring stands alone.
    tokens : str
        ``"expand"``: every token is a sample of the factors; ``"reduce"``: the mean over
        each sequence is, in which gradients of attention's keys cancel: not for the
        natural gradient of a transformer.
    damping : float
        Multiple of a factor's mean eigenvalue that is added to its diagonal, so that
        ``λ_A = damping · tr A / in`` and ``λ_G = damping · tr G / out``.
    memory_budget : int or str, optional
        Most bytes of the statistics of layers that are held while scoring, like
        ``"20GB"``: where they are more, the data is run through in several passes, to
        the same scores. Without it there is one pass.
    host_budget : int or str, optional
        Most bytes of main memory for the mean gradients of a model on another device:
        where ``memory_budget`` asks for several passes and fewer do with the gradients
        kept there, they are, and come to the device a layer at a time. Without it they
        stay on the device.
    scope : str
        ``"layer"``: the blocks of a layer compete; ``"model"``: the blocks of all layers
        compete by score relative to their layer's mean; ``"absolute"``: by score as it
        is.
    allocation : float, optional
        With ``scope="layer"``, the power of a layer's mean score that its density is
        proportional to; 0: each layer trains the same fraction of its blocks. None: 4
        for ``"kfac-natural"`` and ``"kfac-block"``, 0 for other rules.
    spread : float, optional
        How many times its share of a layer's blocks a row or column of blocks may have
        while others have room, at least 1; 0: no limit. None: 1 for those two rules,
        unless ``max_columns`` is below 1; no limit for others.
    max_columns : float
        Largest fraction of a layer's block columns that may have blocks, at least
        ``density``. Only these columns of a layer's input are kept for the backward pass:
        less memory for activations, and a lower total score.
    seed : int
        Seed of the random rule.
    masks : Masks or path, optional
        Blocks chosen before by `sylva_train.select`; without them, rules that need no
        data are scored on the spot. Not written to ``adapter_config.json``.
    block_counts : dict of str to int, optional
        Blocks in each layer; written with an adapter and needed to load it.
    layer_shapes : dict of str to list of int, optional
        ``[out, in]`` of each of these layers; written with an adapter, checked on load.
    base_fingerprint : str, optional
        Identity of the base model's weights; written with an adapter, checked on load.
    checksum : str, optional
        Digest of the adapter's tensors; written with an adapter, checked on load.

    Raises
    ------
    ConfigError
        If an option has a value that cannot be used.
    """

    masks: Masks | str | os.PathLike[str] | None = field(default=None, repr=False)
    block_counts: dict[str, int] | None = field(default=None, repr=False)
    layer_shapes: dict[str, list[int]] | None = field(default=None, repr=False)
    base_fingerprint: str | None = field(default=None, repr=False)
    checksum: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        PeftConfig.__post_init__(self)  # type: ignore[no-untyped-call]
        self.peft_type = SylvaType.SYLVA
        self.folder: Path | None = None
        self.hub: dict[str, Any] = {}
        # PEFT and transformers look for the base model there, and do not know its name.
        if self.base_model_name_or_path == MINILM:
            self.base_model_name_or_path = minilm_folder() or MINILM
        SylvaOptions.__post_init__(self)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> SylvaConfig:
        """Read ``adapter_config.json``, and remember where it lies."""
        path = pretrained_model_name_or_path
        config: SylvaConfig = super().from_pretrained(path, subfolder, **kwargs)
        # No fields: only of use to check the tensors beside it before they are loaded.
        config.folder = Path(path, subfolder or "")
        if not config.folder.is_dir():
            options, *_ = cls._split_kwargs(kwargs)  # type: ignore[no-untyped-call]
            config.hub = {"model_id": path, "subfolder": subfolder} | options
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as PEFT writes them to JSON, but for masks and budgets.

        The folder of `MINILM` becomes its name, which a new configuration turns back.
        """
        # Masks are taken away first: PEFT's deep copy would duplicate every index.
        masks, self.masks = self.masks, None
        try:
            fields: dict[str, Any] = super().to_dict()
        finally:
            self.masks = masks
        # None says what an adapter is: budgets are those of the machine it was made on.
        for name in ("masks", "memory_budget", "host_budget"):
            fields.pop(name, None)
        base = fields["base_model_name_or_path"]
        # On another machine the package lies elsewhere.
        if base is not None and base == minilm_folder():
            fields["base_model_name_or_path"] = MINILM
        return fields
