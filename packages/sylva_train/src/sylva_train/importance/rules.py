"""The rules themselves: from a layer's statistics and weight to its scores.

``W`` is a layer's weight (out, in), ``Γ`` the mean gradient of the loss by it, ``A`` and
``G`` the second moments of its inputs and of its outputs' gradients, here with their
damping on the diagonal. A rule returns a score for each weight, or for each block of
weights, or, where the score is of rank one, for each row and column.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sylva_train.config import SylvaConfig
from sylva_train.curvature import Factor, LayerCurvature, block_sums, strips

from .scores import LayerScores

__all__ = ["RULES", "Inputs"]

#: Side of the blocks that sums are kept of, where blocks to choose are a multiple of it.
UNIT = 16


@dataclass(frozen=True)
class Inputs:
    """What a rule sees of one layer.

    Attributes
    ----------
    weight : torch.Tensor, shape (out, in)
        The pretrained weight.
    layer : LayerCurvature
        The statistics that the rule asks for.
    config : SylvaConfig
        ``damping`` and ``block_size``.
    generator : torch.Generator
        Source of randomness.
    """

    weight: torch.Tensor
    layer: LayerCurvature
    config: SylvaConfig
    generator: torch.Generator

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def A(self) -> Factor:
        """The factor of the inputs."""
        assert self.layer.A is not None
        return self.layer.A

    @property
    def G(self) -> Factor:
        """The factor of the output gradients."""
        assert self.layer.G is not None
        return self.layer.G

    @property
    def gradient(self) -> torch.Tensor:
        """``Γ``."""
        assert self.layer.gradient is not None
        return self.layer.gradient

    @property
    def dead(self) -> bool:
        """Whether no input or no gradient ever reached the layer: nothing matters.

        Squares of what did are below the normal numbers of float32 and have no digits.
        """
        mean = min(self.A.mean_eigenvalue(), self.G.mean_eigenvalue())
        return mean < torch.finfo(torch.float32).tiny

    def shifts(self) -> tuple[float, float]:
        """λ_A and λ_G: ``damping`` times each factor's mean eigenvalue."""
        damping = self.config.damping
        return damping * self.A.mean_eigenvalue(), damping * self.G.mean_eigenvalue()

    @functools.cached_property
    def inverse_diagonals(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``diag A⁻¹`` (in,) and ``diag G⁻¹`` (out,), float64."""
        λ_A, λ_G = self.shifts()
        return self.A.inverse_diagonal(λ_A), self.G.inverse_diagonal(λ_G)

    @property
    def indefinite(self) -> int:
        """Entries of the inverse diagonals that are not positive.

        None with exact or MLR factors; a truncated HODLR factor is in general indefinite.
        """
        if self.config.curvature != "hodlr" or self.layer.A is None or self.dead:
            return 0
        return sum(int((diagonal <= 0).sum()) for diagonal in self.inverse_diagonals)

    def summed(self, scores: Callable[[slice], torch.Tensor]) -> LayerScores:
        """Scores of single weights, summed over blocks.

        ``scores`` returns those of some rows: copies of all of a large layer's numbers
        take gigabytes. The sums are over small blocks where those of ``block_size`` are
        made of them: the file then serves their multiples too.
        """
        size = self.unit
        grid = [block_sums(scores(rows), size) for rows in strips(*self.shape, size)]
        return LayerScores(self.shape, grid=torch.cat(grid).cpu(), unit=size)

    @property
    def unit(self) -> int:
        """Side of the blocks that scores of single weights are summed over."""
        size = self.config.block_size
        return size if size % UNIT else UNIT

    def saliency(self, matrix: torch.Tensor) -> LayerScores:
        """Squares of a matrix (out, in) over ``diag G⁻¹ · diag A⁻¹``, summed."""
        if self.dead:
            return self.zeros()
        inverse_A, inverse_G = self.inverse_diagonals
        return self.summed(
            lambda rows: (
                matrix[rows].double().square() / inverse_G[rows].outer(inverse_A)
            )
        )

    def zeros(self) -> LayerScores:
        """Scores of a layer where nothing matters."""
        return LayerScores(self.shape, grid=self.empty(self.unit), unit=self.unit)

    def empty(self, size: int) -> torch.Tensor:
        """Return zeros (block rows, block columns), float64, on the CPU."""
        return torch.zeros(
            [math.ceil(n / size) for n in self.shape], dtype=torch.float64
        )


def kfac(inputs: Inputs) -> LayerScores:
    """Score each output row and input column (Mu et al. 2024, eq. 18-20).

    Cost of zeroing a column or a row of ``Γ`` under the Fisher matrix ``A ⊗ G``::

        s_in[j]  = Γ[:, j]ᵀ G Γ[:, j] / [A⁻¹]_jj
        s_out[k] = Γ[k, :]  A Γ[k, :]ᵀ / [G⁻¹]_kk
        score[k, j] = s_out[k] · s_in[j]
    """
    Γ = inputs.gradient
    if inputs.dead:
        out, in_ = inputs.shape
        nothing = torch.zeros(out + in_, dtype=torch.float64)
        return LayerScores(inputs.shape, s_out=nothing[:out], s_in=nothing[out:])
    λ_A, λ_G = inputs.shifts()
    cost_in = inputs.G.quadratic_forms(Γ, λ_G)
    cost_out = inputs.A.quadratic_forms(Γ.T, λ_A)
    inverse_A, inverse_G = inputs.inverse_diagonals
    return LayerScores(
        inputs.shape,
        s_out=(cost_out / inverse_G).cpu(),
        s_in=(cost_in / inverse_A).cpu(),
    )


def kfac_element(inputs: Inputs) -> LayerScores:
    """Score each entry of the gradient: ``Γ² / (diag G⁻¹ · diag A⁻¹)``.

    The saliency of the optimal brain surgeon (Hassibi and Stork 1993) with Kronecker
    factors, of the gradient in place of the weight: what zeroing one entry costs.
    """
    return inputs.saliency(inputs.gradient)


def kfac_natural(inputs: Inputs) -> LayerScores:
    """Score each weight's part in the natural gradient's decrease: ``Γ ∘ G⁻¹ Γ A⁻¹``.

    The quadratic model of the loss with the Fisher matrix ``A ⊗ G`` falls by half of the
    sum of all scores when the whole layer takes its natural-gradient step ``G⁻¹ Γ A⁻¹``
    (Martens and Grosse 2015). A part can be negative: a weight that moves only to make
    up for others.
    """
    Γ = inputs.gradient
    if inputs.dead:
        return inputs.zeros()
    λ_A, λ_G = inputs.shifts()
    # One copy in float64, in place: each factor needs all of the other's solution.
    step = inputs.A.solve(Γ.T, λ_A).T
    inputs.G.solve(step, λ_G, overwrite=True)
    return inputs.summed(lambda rows: step[rows].mul_(Γ[rows]))


def kfac_block(inputs: Inputs) -> LayerScores:
    """Score each block by the decrease that training it alone gives.

    With ``b`` a block's columns and ``a`` its rows: ``tr(Γ_abᵀ G_aa⁻¹ Γ_ab A_bb⁻¹)``,
    twice the most that the quadratic model with ``A ⊗ G`` falls while all other weights
    stay. Not additive: two blocks together may gain more or less than their sum.
    """
    size = inputs.config.block_size
    if inputs.dead:
        grid = inputs.empty(size)
    else:
        λ_A, λ_G = inputs.shifts()
        L_G = inputs.G.block_choleskys(size, λ_G)
        L_A = inputs.A.block_choleskys(size, λ_A)
        sums = [
            whitened_sums(
                inputs.gradient[rows].double(),
                L_G[rows.start // size : math.ceil(rows.stop / size)],
                L_A,
            )
            for rows in strips(*inputs.shape, size)
        ]
        grid = torch.cat(sums).cpu()
    return LayerScores(inputs.shape, grid=grid, unit=size, additive=False)


def whitened_sums(
    Γ: torch.Tensor, L_G: torch.Tensor, L_A: torch.Tensor
) -> torch.Tensor:
    """Sum the squares of ``L_G⁻¹ Γ_ab L_A⁻ᵀ`` over each block.

    Parameters
    ----------
    Γ : torch.Tensor, shape (rows, columns), float64
        The last blocks may be cut off.
    L_G, L_A : torch.Tensor, shapes (block rows, size, size), (block columns, size, size)
        Cholesky factors of the rows' and of the columns' blocks.

    Returns
    -------
    torch.Tensor, shape (block rows, block columns), float64
    """
    size = L_G.shape[-1]
    padding = (0, -Γ.shape[1] % size, 0, -Γ.shape[0] % size)
    # (block rows, b, in), then with the rows' factors taken off, (block columns, b, …).
    rows = F.pad(Γ, padding).unflatten(0, (-1, size))
    rows = torch.linalg.solve_triangular(L_G, rows, upper=False)
    columns = rows.permute(2, 0, 1).unflatten(0, (-1, size)).flatten(2)
    whitened = torch.linalg.solve_triangular(L_A, columns, upper=False)
    sums: torch.Tensor = whitened.square_().sum(1).unflatten(1, (-1, size)).sum(2)
    return sums.T


def kfac_pruner(inputs: Inputs) -> LayerScores:
    """Loss of removing each weight under K-FAC: ``W² / (diag A⁻¹ · diag G⁻¹)``.

    The saliency of the K-FAC pruner (Wang et al. 2019), the optimal brain surgeon with
    Kronecker factors.
    """
    return inputs.saliency(inputs.weight)


def kfac_diag(inputs: Inputs) -> LayerScores:
    """Score by the root of the Fisher matrix's diagonal, ``√(G_kk A_jj)``.

    The diagonal of ``A ⊗ G``, which is that of `fisher_diag` if a token's inputs and its
    output gradients are independent (Martens and Grosse 2015): how far a step of one size
    for all weights, as Adam's is, moves what the model says. It takes no gradient, which
    few samples tell badly, and no inverse.
    """
    assert inputs.layer.output_squares is not None
    assert inputs.layer.input_squares is not None
    return LayerScores(
        inputs.shape,
        s_out=inputs.layer.output_squares.double().sqrt().cpu(),
        s_in=inputs.layer.input_squares.double().sqrt().cpu(),
    )


def fisher_diag(inputs: Inputs) -> LayerScores:
    """Mean squared gradient of a sample (Sung et al. 2021, FISH)."""
    assert inputs.layer.fisher is not None
    return LayerScores(
        inputs.shape, grid=inputs.layer.fisher.cpu(), unit=inputs.config.block_size
    )


def gradient(inputs: Inputs) -> LayerScores:
    """``|Γ|``: the decrease that a step of one size for all weights gives, as Adam's is."""
    return inputs.summed(lambda rows: inputs.gradient[rows].abs())


def weight_gradient(inputs: Inputs) -> LayerScores:
    """``|W ∘ Γ|``: loss of removing a weight, to first order (Molchanov et al. 2019)."""
    return inputs.summed(
        lambda rows: inputs.weight[rows].float().mul(inputs.gradient[rows]).abs_()
    )


def wanda(inputs: Inputs) -> LayerScores:
    """``|W|`` times the root mean square of the weight's input (Sun et al. 2024)."""
    assert inputs.layer.input_squares is not None
    root = inputs.layer.input_squares.sqrt()
    return inputs.summed(lambda rows: inputs.weight[rows].float().abs() * root)


def magnitude(inputs: Inputs) -> LayerScores:
    """``|W|``."""
    return inputs.summed(lambda rows: inputs.weight[rows].float().abs())


def random(inputs: Inputs) -> LayerScores:
    """Draw a number for each block: all are alike."""
    size = inputs.config.block_size
    rows, columns = (math.ceil(n / size) for n in inputs.shape)
    grid = torch.rand(rows, columns, generator=inputs.generator, dtype=torch.float64)
    return LayerScores(inputs.shape, grid=grid, unit=size)


#: Each rule, and what it needs of a pass over the data.
RULES: dict[str, tuple[Callable[[Inputs], LayerScores], tuple[str, ...]]] = {
    "kfac": (kfac, ("factors", "gradient")),
    "kfac-block": (kfac_block, ("factors", "gradient")),
    "kfac-natural": (kfac_natural, ("factors", "gradient")),
    "kfac-element": (kfac_element, ("factors", "gradient")),
    "kfac-diag": (kfac_diag, ("inputs", "outputs")),
    "fisher-diag": (fisher_diag, ("fisher",)),
    "magnitude": (magnitude, ()),
    "wanda": (wanda, ("inputs",)),
    "gradient": (gradient, ("gradient",)),
    "weight-gradient": (weight_gradient, ("gradient",)),
    "random": (random, ()),
    "kfac-pruner": (kfac_pruner, ("factors",)),
}
