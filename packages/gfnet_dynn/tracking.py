"""What a run says, to its folder and to MLflow: metrics under the names of the original."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shared_core.runs import StageLog


class Tracker:
    """Logs to an sqlite store beside the runs, or does nothing when it is off or not installed.

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
        self._mlflow = mlflow
        self._guard(lambda: self._start(folder.resolve(), experiment, run_name, run_id))

    def _start(self, folder: Path, experiment: str, run_name: str, run_id: str | None) -> None:
        mlflow = self._mlflow
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
        self.run_id = run.info.run_id

    def _guard(self, call: Callable[[], object]) -> None:
        """A store that fails (a full disk, a broken database) must not end the training."""
        if self._mlflow is None:
            return
        try:
            call()
        except Exception as error:  # mlflow, sqlalchemy and the disk each raise their own
            self._mlflow = None
            line = " ".join(str(error).split())[:200]
            print(
                f"mlflow failed ({line}): from here metrics go to metrics.jsonl only",
                file=sys.stderr,
            )

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Log the configuration; a value longer than the store takes is cut."""
        texts = {key: str(value)[:500] for key, value in values.items()}
        self._guard(lambda: self._mlflow.log_params(texts))

    def metrics(self, values: Mapping[str, float], *, step: int, prefix: str = "") -> None:
        """Log numbers under ``prefix/name``."""
        numbers = {
            f"{prefix}/{key}" if prefix else key: float(value)
            for key, value in values.items()
            if isinstance(value, (int, float))
        }
        self._guard(lambda: self._mlflow.log_metrics(numbers, step=step))

    def artifact(self, path: Path) -> None:
        """Keep a copy of a file with the run."""
        self._guard(lambda: self._mlflow.log_artifact(str(path)))

    def close(self, *, failed: bool = False) -> None:
        """End the run."""
        self._guard(lambda: self._mlflow.end_run("FAILED" if failed else "FINISHED"))
        self._mlflow = None


class RunLog(StageLog):
    """The run's log; every number also goes to the tracker."""

    tracker: Tracker | None = None

    def write(self, stage: str, split: str, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics; ``split`` becomes the tracker's prefix (``train``, ``val``)."""
        super().write(stage, split, step, values)
        if self.tracker is not None:
            prefix = split if stage == "exits" else f"{stage}/{split}"
            self.tracker.metrics(values, step=step, prefix=prefix)
