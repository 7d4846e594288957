"""Plot the losses of one or more training runs in one picture.

    python testing_tools/plot_runs.py models/story5000.jsonl models/story10000.jsonl --by tokens

Writes runs.png next to the first log. Each run has its training loss, smoothed (the pale line shows the logged values),
and its validation loss, dashed.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from common.cli import UserError, option, parse_options, run_script
from common.files import atomic_write
from training.metrics import read_metrics

MAX_SMOOTHING = 0.9  # weight of the past in the moving average of a long log; a short log is not smoothed
# The key in a record, the label of the axis, and how many of the record's units make one of the axis'.
X_AXES = {
    "iter": ("iter_num", "iteration", 1),
    "tokens": ("tokens_seen", "tokens seen (millions)", 1e6),
    "time": ("elapsed_s", "time (minutes)", 60),
}


@dataclasses.dataclass(frozen=True)
class PlotOptions:
    runs: tuple[str, ...] = option((), "the logs of runs, models/*.jsonl", positional=True, nargs="+")
    by: str = option("iter", "the horizontal axis", choices=tuple(X_AXES))
    output: str | None = option(None, "the picture (default: runs.png next to the first log)", metavar="FILE")


def points(records: Sequence[dict], key: str, by: str) -> tuple[list[float], list[float]]:
    """The positions on the axis at which `key` was logged, and its values.

    >>> points([{"iter_num": 0, "val_loss": 10.8}, {"iter_num": 9, "loss": 5.0}], "loss", "iter")
    ([9.0], [5.0])
    """
    name, _, unit = X_AXES[by]
    start = {"iter_num": 0, "tokens_seen": 0, "elapsed_s": 0.0}  # the evaluation before the first iteration
    records = [{**start, **record} if record["iter_num"] == 0 else record for record in records]
    found = [(record[name] / unit, record[key]) for record in records if record.get(key) is not None and name in record]
    return [float(x) for x, _ in found], [y for _, y in found]


def smooth(values: Sequence[float]) -> list[float]:
    """An exponential moving average over about a fiftieth of the values, with its start corrected.

    The correction is that of "Adam" (Kingma and Ba 2015, section 3).

    >>> smooth([3.0, 2.0])
    [3.0, 2.0]
    """
    past = min(MAX_SMOOTHING, 1 - 1 / max(1, len(values) / 50))
    average, smoothed = 0.0, []
    for n, value in enumerate(values, 1):
        average = past * average + (1 - past) * value
        smoothed.append(average / (1 - past**n))
    return smoothed


def read_runs(paths: Sequence[str]) -> dict[str, list[dict]]:
    """The records of each run by its file name, preceded by the folder if two files have the same name.

    Raises UserError for a log that is missing or empty.
    """
    stems = [Path(path).stem for path in paths]
    runs = {}
    for path, stem in zip(map(Path, paths), stems, strict=True):
        if not path.is_file():
            raise UserError(f"{path} not found; give the .jsonl that train.py writes next to the checkpoint")
        records = read_metrics(path)
        if not any("loss" in record or "val_loss" in record for record in records):
            raise UserError(f"{path} contains no loss; give a .jsonl written by train.py")
        runs[stem if stems.count(stem) == 1 else str(path.with_suffix(""))] = records
    return runs


def draw_runs(path: Path, runs: dict[str, list[dict]], by: str) -> None:
    """Plot the runs' losses as a PNG. Raises UserError if matplotlib is missing."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import LogLocator, NullLocator
    except ImportError as error:
        raise UserError("plotting needs matplotlib; run: pip install -r requirements.txt") from error
    colours = matplotlib.colormaps["tab10" if len(runs) <= 10 else "tab20"]
    figure = Figure(figsize=(10, 6), layout="constrained", dpi=110)
    axes = figure.subplots()
    for number, (name, records) in enumerate(runs.items()):
        colour = colours(number % colours.N)
        x, losses = points(records, "loss", by)
        axes.plot(x, losses, color=colour, alpha=0.2, linewidth=0.8)
        axes.plot(x, smooth(losses), color=colour, linewidth=1.4)
        axes.plot(*points(records, "val_loss", by), color=colour, linestyle="--", marker="o", markersize=4)
        axes.plot([], [], color=colour, linewidth=4, label=name)
    low, high = axes.dataLim.y0, axes.dataLim.y1
    if low > 0 and high > 3 * low:  # on a linear axis the steep start would leave no room for the rest
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(X_AXES[by][1])
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Training and validation loss")
    axes.grid(alpha=0.3)
    kinds = [
        Line2D([], [], color="black", label="training, smoothed"),
        Line2D([], [], color="black", linestyle="--", marker="o", markersize=4, label="validation"),
    ]
    handles = axes.get_legend_handles_labels()[0]
    figure.legend(handles=[*kinds, *handles], loc="outside right upper", fontsize=9)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def main() -> None:
    options = parse_options(PlotOptions, __doc__)
    runs = read_runs(options.runs)
    path = Path(options.output or Path(options.runs[0]).with_name("runs.png"))
    draw_runs(path, runs, options.by)
    print(f"wrote {path}")


if __name__ == "__main__":
    run_script(main)
