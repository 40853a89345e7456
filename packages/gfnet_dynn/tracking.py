"""MLflow: metrics under the names of the original, on their true scale; optional at run time."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Tracker:
    """Logs to an sqlite store beside the runs, or does nothing when it is off.

    Args:
        folder: where ``mlflow.db`` and ``mlartifacts/`` lie, shared by all runs.
        experiment: name of the experiment, the data set's.
        run_name: name of the run.
        enabled: the user's ``--use_mlflow``.
        run_id: the run to go on with, of an earlier process.
    """

    def __init__(
        self,
        folder: Path,
        *,
        experiment: str,
        run_name: str,
        enabled: bool = True,
        run_id: str | None = None,
    ) -> None:
        self._mlflow: Any = None
        self.run_id = run_id
        if not enabled:
            return
        try:
            import mlflow
        except ImportError:
            print(
                "mlflow is not installed: metrics go to metrics.jsonl only "
                "(pip install 'gfnet_dynn[mlflow]', or --use_mlflow false)",
                file=sys.stderr,
            )
            return
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
        if mlflow.get_experiment_by_name(experiment) is None:
            place = (folder / "mlartifacts" / experiment).as_uri()
            mlflow.create_experiment(experiment, artifact_location=place)
        mlflow.set_experiment(experiment)
        known = run_id is not None and mlflow.MlflowClient().search_runs(
            [mlflow.get_experiment_by_name(experiment).experiment_id],
            filter_string=f"attributes.run_id = '{run_id}'",
        )
        run = mlflow.start_run(run_id=run_id if known else None, run_name=run_name)
        self.run_id, self._mlflow = run.info.run_id, mlflow

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Log the configuration; a value longer than the store takes is cut."""
        if self._mlflow:
            self._mlflow.log_params({key: str(value)[:500] for key, value in values.items()})

    def metrics(self, values: Mapping[str, float], *, step: int, prefix: str = "") -> None:
        """Log numbers under ``prefix/name``."""
        if self._mlflow:
            numbers = {
                f"{prefix}/{key}" if prefix else key: float(value)
                for key, value in values.items()
                if isinstance(value, (int, float))
            }
            self._mlflow.log_metrics(numbers, step=step)

    def artifact(self, path: Path) -> None:
        """Keep a copy of a file with the run."""
        if self._mlflow:
            self._mlflow.log_artifact(str(path))

    def close(self, *, failed: bool = False) -> None:
        """End the run."""
        if self._mlflow:
            self._mlflow.end_run("FAILED" if failed else "FINISHED")
            self._mlflow = None
