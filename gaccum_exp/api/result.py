"""What a sweep shows, as values."""

import io
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gaccum_exp.errors import BadInputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from gaccum_exp.arms.report import Report


@dataclass(frozen=True, repr=False, eq=False, slots=True)
class SweepResult:
    """What a sweep shows, or several compared as one.

    It prints as the table and the sentences that the command line prints; a notebook shows the top of
    the page.
    """

    _report: "Report" = field()

    @property
    def sweep_id(self) -> str:
        """Its id, the tag of its runs; of several `first+second`."""
        return "+".join(self._report.sweep_ids)

    @property
    def folder(self) -> Path:
        """Where its files are: the page, `comparison.csv`, figures; of a sweep its arms too."""
        return self._report.folder

    @property
    def tracking_uri(self) -> str:
        """The MLflow store that holds its runs."""
        return self._report.uri

    @property
    def page(self) -> Path | None:
        """The page, a file that needs no other; None where none was asked for."""
        return next((path for path in self._report.files if path.name == "report.html"), None)

    @property
    def table(self) -> "DataFrame":
        """A row for each arm, with the columns of `comparison.csv`."""
        import pandas

        from gaccum_exp.report.compare.comparison import csv_table

        head, rows = csv_table(self._report.comparison)
        return pandas.DataFrame(rows, columns=head)

    @property
    def verdicts(self) -> dict[str, str | None]:
        """The verdict on each arm's gradient, by the arm's name; None: it was not audited."""
        return {row.name: row.verdict for row in self._report.comparison.rows}

    @property
    def summary(self) -> str:
        """The answers in words, a line for each setting, and for the noise scale if it was measured."""
        from gaccum_exp.report.text.summary import summary
        from gaccum_exp.report.text.table import say_worth

        report = self._report
        said = (summary(report.comparison), say_worth(report.comparison, report.batches))
        return "\n".join(filter(None, said))

    def figure(self, name: str, width: str | float = "double") -> "Figure":
        """Draw a figure of the comparison.

        Args:
            name: `loss_curves`, `memory`, `step_time`, `memory_frontier` or `batches`, or as much of it
                as tells it from the others: `loss`.
            width: `single` (a column of a paper), `double` (its text), `talk` (a slide), or inches.

        Raises:
            BadInputError: there is no such figure, or nothing to be drawn in it.
        """
        from gaccum_exp.report.figures.save_figures import NAMES, figure_of

        found = (
            [name] if name in NAMES else [known for known in NAMES if name and known.startswith(name)]
        )
        if len(found) != 1:
            raise BadInputError(f"figure({name!r}): is not one of {', '.join(NAMES)}")
        report = self._report
        figure = figure_of(found[0], report.comparison, report.arms, report.batches, width)
        if figure is None:
            raise BadInputError(f"figure({name!r}): {found[0]} has nothing to show of this sweep")
        vars(figure)["_repr_png_"] = partial(_png_of, figure)  # for a notebook without pyplot
        return figure

    def __repr__(self) -> str:
        from gaccum_exp.report.text.table import print_comparison

        said = io.StringIO()
        print_comparison(self._report.comparison, self._report.batches, said)
        return said.getvalue().rstrip()

    def _repr_html_(self) -> str:
        from gaccum_exp.report.page.write_page import page_top

        return page_top(self._report.comparison, self._report.arms, self._report.batches)


def _png_of(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
