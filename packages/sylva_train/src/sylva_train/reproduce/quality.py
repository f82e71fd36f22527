"""The paper's tables of model quality: what each varies, and the runs that it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sylva_train._checks import ConfigError
from sylva_train.baselines import parse_method
from sylva_train.comparison import (
    Comparison,
    Job,
    attempt,
    best_rates,
    check_multiples,
    check_plan,
    rate_jobs,
    tuning_metric,
)

__all__ = ["TABLES", "Cell", "Plan", "Table"]

#: The paper's rule, with factors that stay definite, and the one ahead on the small LLaMA.
SYLVA, NATURAL = "sylva:kfac:mlr", "sylva:kfac-natural"
#: Options of scoring alone: what one of them is changes nothing of how to train.
SCORING = {
    "levels", "rank", "exact_below", "samples", "tokens", "damping", "allocation", "spread",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the paper, or one of its kind.

    Parameters
    ----------
    name, title : str
        What it is called, and what it shows.
    methods : tuple of str
        As `parse_method` reads them.
    option : str, optional
        What is varied: a field of `SylvaConfig`.
    values : tuple
        What it is set to.
    fixed : mapping
        Other fields of `SylvaConfig`, set alike for all.
    """

    name: str
    title: str
    methods: tuple[str, ...] = (SYLVA,)
    option: str | None = None
    values: tuple[Any, ...] = (None,)
    fixed: Mapping[str, Any] = field(default_factory=dict)


#: Those of the paper (Mu et al. 2024) by number, then studies that it does not have. A
#: partition of its table 6 is a level here; where a factor is small enough to be kept
#: exactly, neither levels nor rank would matter, so all are kept hierarchically there.
TABLES = {
    table.name: table
    for table in (
        Table(
            name="table3",
            title="Model quality of full fine-tuning, LoRA, the K-FAC pruner and Sylva",
            methods=(
                "full", "lora", "kfac-pruner", SYLVA, "sylva:kfac:hodlr", NATURAL,
                "sylva:random",
            ),
        ),
        Table(
            name="table4",
            title="Sensitivity to LoRA's rank and Sylva's density, at equal budgets",
            methods=("lora", SYLVA, NATURAL, "sylva:random"),
            option="density",
            values=(0.133, 0.1, 0.033, 0.005),
        ),
        Table(
            name="table5",
            title="Sensitivity to the block size",
            methods=(SYLVA, NATURAL),
            option="block_size",
            values=(16, 64, 128),
        ),
        Table(
            name="table6",
            title="Sensitivity to the number of levels of the hierarchical factors",
            methods=(SYLVA, NATURAL),
            option="levels",
            values=(4, 6, 8),
            fixed={"exact_below": 1},
        ),
        Table(
            name="table7",
            title="Sensitivity to the number of samples that are scored",
            methods=(SYLVA, NATURAL),
            option="samples",
            values=(128, 256, 1024),
        ),
        Table(
            name="rules",
            title="Rules of choosing blocks, at equal budget",
            methods=(
                SYLVA, NATURAL, "sylva:kfac-block", "sylva:kfac-diag",
                "sylva:fisher-diag", "sylva:gradient", "sylva:wanda", "sylva:magnitude",
                "sylva:random",
            ),
        ),
        Table(
            name="damping",
            title="Sensitivity to the damping of the factors",
            methods=(SYLVA, NATURAL),
            option="damping",
            values=(1e-4, 1e-3, 1e-2, 1e-1, 1.0),
        ),
        Table(
            name="rank",
            title="Sensitivity to the rank of the hierarchical factors",
            methods=(SYLVA, NATURAL),
            option="rank",
            values=(4, 16, 64),
            fixed={"exact_below": 1},
        ),
        Table(
            name="allocation",
            title="Sensitivity to how much more goes to layers that score high",
            methods=(NATURAL,),
            option="allocation",
            values=(0.0, 1.0, 2.0, 4.0, 8.0),
        ),
        Table(
            name="tokens",
            title="Every token a sample of the factors, or each text's mean",
            methods=(SYLVA, NATURAL),
            option="tokens",
            values=("expand", "reduce"),
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One entry of a table, over its seeds.

    Parameters
    ----------
    setting : str
        Name of model and task.
    method : str
        What is trained.
    value : object
        Of the option that the table varies; None where it varies none.
    """

    setting: str
    method: str
    value: Any

    @property
    def label(self) -> str:
        """The cell in words."""
        parts = [self.setting, parse_method(self.method).label]
        return ", ".join([*parts, *([] if self.value is None else [str(self.value)])])

    @property
    def name(self) -> str:
        """The cell in a file's name."""
        parts = [self.setting, self.method.replace(":", "-")]
        parts += [] if self.value is None else [str(self.value)]
        return "-".join(parts).replace("/", "-")

    @property
    def kind(self) -> str:
        """What its runs take about as long as."""
        return f"{self.setting} {self.method}"


class Plan:
    """The runs of a table.

    Parameters
    ----------
    table : Table
        What is varied.
    settings : mapping of str to Comparison
        By name, model and task, options, rates and seeds; the methods are the table's.
    multiples : sequence of float
        Multiples of each method's learning rate to choose the best of, on a tenth of the
        training data that is held out, by the metric or a language model's perplexity;
        empty to take the rates as they are. Options of scoring alone share the choice.

    Raises
    ------
    ConfigError
        If a value is not one of its option, two settings have one name, a multiple is not
        a positive number, or a seed is that by which rates are chosen.
    """

    def __init__(
        self,
        table: Table,
        settings: Mapping[str, Comparison],
        multiples: Sequence[float] = (),
    ):
        if not settings:
            msg = "`settings` must have at least one model and task."
            raise ConfigError(msg)
        seeds = {seed for setting in settings.values() for seed in setting.seeds}
        self.table, self.multiples = table, check_multiples(multiples, seeds)
        self.settings = {
            name: dataclasses.replace(
                setting, sylva=dataclasses.replace(setting.sylva, **table.fixed)
            )
            for name, setting in settings.items()
        }
        self.cells = [
            Cell(name, method, value)
            for name in settings
            for value in table.values
            for method in dict.fromkeys(parse_method(m).name for m in table.methods)
        ]
        for cell in self.cells:
            self.comparison(cell)

    def check(self) -> None:
        """Find what is wrong with models, data and options before the first run does.

        Raises
        ------
        SylvaError
            As a run would.
        """
        for cell in {(c.setting, c.value): c for c in self.cells}.values():
            check_plan(self.comparison(cell))

    def comparison(self, cell: Cell, **changes: Any) -> Comparison:
        """Return a cell's runs as a comparison of one method."""
        setting = self.settings[cell.setting]
        sylva = setting.sylva
        if self.table.option is not None:
            sylva = dataclasses.replace(sylva, **{self.table.option: cell.value})
        options: dict[str, Any] = {"sylva": sylva, "methods": (cell.method,)} | changes
        return dataclasses.replace(setting, **options)

    def tuning(self) -> dict[tuple[Cell, float], Job]:
        """Return the runs that choose learning rates, by cell and rate."""
        found: dict[tuple[Cell, float], Job] = {}
        for cell in dict.fromkeys(map(self.tuned, self.cells)):
            one, name, label = self.comparison(cell), cell.name, cell.label
            jobs = rate_jobs(
                one, self.multiples, name=name, label=label, kind=cell.kind
            )
            found |= {(cell, rate): job for rate, job in jobs.items()}
        return found

    def tuned(self, cell: Cell) -> Cell:
        """Return the cell whose learning rate a cell takes: its own, or the first one's."""
        if self.table.option in SCORING:
            return dataclasses.replace(cell, value=self.table.values[0])
        return cell

    def rates(
        self, rows: Mapping[tuple[Cell, float], Mapping[str, Any]]
    ) -> dict[Cell, float]:
        """Return the learning rate of each cell that scored best when it was tuned.

        Raises
        ------
        NonFiniteError
            If a method diverged at every rate.
        """
        best = best_rates(
            rows,
            metric=lambda cell: tuning_metric(self.settings[cell.setting]),
            label=lambda cell: cell.label,
        )
        return {cell: best[self.tuned(cell)] for cell in self.cells if best}

    def runs(self, rates: Mapping[Cell, float]) -> list[tuple[Cell, Job]]:
        """Return the runs that are reported: those of a seed beside each other."""
        found = []
        seeds = dict.fromkeys(s for c in self.settings.values() for s in c.seeds)
        for seed in seeds:
            for cell in self.cells:
                changes = {}
                if cell in rates:
                    changes = {"learning_rates": {cell.method: rates[cell]}}
                one = self.comparison(cell, **changes)
                if seed in one.seeds:
                    name, label = f"{cell.name}-{seed}", f"{cell.label}, seed {seed}"
                    job = attempt(one, seed, name=name, label=label, kind=cell.kind)
                    found.append((cell, job))
        return found
