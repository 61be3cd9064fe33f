"""Take the screenshot of a sweep in the MLflow UI, as the link printed after the sweep shows it.

    python experiments/screenshot.py <sweep_id> [--uri sqlite:///mlflow.db] [--out FILE.png]

It needs the test extra (Playwright) and Debian's chromium.
"""

import argparse
import tempfile
from pathlib import Path

from mlflow import MlflowClient
from mlflow_browser import (
    CHROMIUM,
    chart,
    chromium_page,
    drawn_bars,
    drawn_curves,
    mlflow_server,
)

from gaccum_exp.tracking.mlflow_ui import ui_link


def find_sweep(uri: str, sweep_id: str) -> tuple[str, int]:
    """Return the id of the experiment that holds the sweep, and the number of its arms."""
    client = MlflowClient(uri)
    for experiment in client.search_experiments():
        runs = client.search_runs([experiment.experiment_id], f"tags.sweep_id='{sweep_id}'")
        if runs:
            return experiment.experiment_id, len(runs)
    raise SystemExit(f"no run in {uri} has the tag sweep_id={sweep_id}")


def main() -> None:
    """Serve the store, open the link, wait for curves and bars, and write the PNG."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep_id")
    parser.add_argument("--uri", default="sqlite:///mlflow.db")
    parser.add_argument("--out", type=Path, default=Path("experiments/demo/mlflow_chart.png"))
    arguments = parser.parse_args()
    if CHROMIUM is None:
        raise SystemExit("chromium is not installed (Debian: apt-get install chromium)")
    experiment_id, arms = find_sweep(arguments.uri, arguments.sweep_id)
    with (
        tempfile.TemporaryDirectory() as folder,
        mlflow_server(arguments.uri, Path(folder) / "server.log") as address,
        chromium_page(height=1030) as page,
    ):
        page.goto(ui_link(address, experiment_id, arguments.sweep_id))
        # Arms that agree to less than a pixel cannot be told apart, so their number is no promise.
        curves = drawn_curves(chart(page, "train/loss"))
        bars = drawn_bars(chart(page, "time/step_ms"))
        page.mouse.move(0, 0)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=arguments.out)
    told = f"{curves} curves that can be told apart, {bars} bars"
    print(f"{arguments.out}: {arms} arms, {told}")


if __name__ == "__main__":
    main()
