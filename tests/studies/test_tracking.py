"""A store as MLflow runs: with MLflow itself where it is installed, with a small stand-in everywhere."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
from study_fakes import FakeBackend, config

from quantlens.errors import QuantlensError, UnsupportedError
from quantlens.studies import tracking
from quantlens.studies.results import Results
from quantlens.studies.runner import run_study
from quantlens.studies.store import Store

SMALL = {"methods": ["percentile"], "bits": ["W8A8"], "seeds": [0, 13]}


class Metric(NamedTuple):
    key: str
    value: float
    timestamp: int
    step: int


class Param(NamedTuple):
    key: str
    value: str


class Page(list):
    token: str | None = None


class Client:
    """The part of MlflowClient that is used, with its limits: pages, and a server that may fail."""

    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: list[Any] = []
        self.fail_after = 10**9

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        return self.experiments.setdefault(name, str(len(self.experiments) + 1))

    def search_runs(self, experiments: list[str], page_token: str | None = None) -> Page:
        at = int(page_token or 0)
        page = Page(self.runs[at : at + 1])
        page.token = str(at + 1) if at + 1 < len(self.runs) else None
        return page

    def create_run(self, experiment: str, *, start_time: int, tags: dict[str, str], run_name: str) -> Any:
        info = SimpleNamespace(run_id=str(len(self.runs)), status="RUNNING", name=run_name)
        data = SimpleNamespace(tags=tags, params={}, metrics={})
        self.runs.append(SimpleNamespace(info=info, data=data))
        return self.runs[-1]

    def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
        self.fail_after -= 1
        if self.fail_after < 0:
            raise ConnectionError("the server is gone")
        assert len(metrics) + len(params) <= 1000
        assert len(params) <= 100
        self.runs[int(run)].data.metrics.update({m.key: m.value for m in metrics})
        self.runs[int(run)].data.params.update({p.key: p.value for p in params})

    def set_terminated(self, run: str, *, status: str, end_time: int) -> None:
        self.runs[int(run)].info.status = status


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    entities = ModuleType("mlflow.entities")
    entities.Metric, entities.Param = Metric, Param  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return Client()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tracking")
    ood = {"letters & more": "embedded:letters[0:20]"}
    run_study(config(**SMALL, ood=ood), out, progress=False, backend=FakeBackend(out / "log"))
    return out


def test_every_cell_is_logged_once(store: Path, client: Client) -> None:
    assert tracking.log(store, "stand-in", client=client) == (3, 0)
    assert tracking.log(store, "stand-in", client=client) == (0, 3)
    cells = Store(store).cells()
    assert [run.data.tags[tracking.KEY] for run in client.runs] == [cell.key for cell in cells]
    for run, row in zip(client.runs, Results(cells).rows(), strict=True):
        assert run.info.status == "FINISHED"
        assert run.data.metrics["id.top1"] == row["id.top1"]
        assert run.data.metrics["ood.letters _ more.msp.auroc"] == row["ood.letters & more.msp.auroc"]
        assert run.data.params["seed"] == str(row["seed"])
    assert client.runs[1].data.params["option.percentile"] == "99.9"
    assert list(client.experiments) == ["test"]


def test_a_run_that_was_cut_short_is_completed(store: Path, client: Client) -> None:
    client.fail_after = 3
    with pytest.raises(QuantlensError, match=r"server is gone.*not logged twice"):
        tracking.log(store, "stand-in", client=client)
    client.fail_after = 10**9
    logged, before = tracking.log(store, "stand-in", client=client)
    assert logged + before == 3
    assert len(client.runs) == 3
    assert all(run.data.metrics and run.data.params for run in client.runs)


def test_without_mlflow_it_says_what_to_install(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    with pytest.raises(UnsupportedError, match=r"quantlens\[mlflow\]"):
        tracking.log(store, "http://localhost:1")


def test_with_mlflow_itself(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert tracking.log(store, uri) == (3, 0)
    assert tracking.log(store, uri) == (0, 3)
