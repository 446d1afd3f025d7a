"""The comparison of a pipeline run's training runs: finished runs, failures with reasons, and statistics over seeds."""

from pathlib import Path

import pytest

from vitdet import stages
from vitdet.config import load_config, save_config
from vitdet.stages.outcomes import read_outcomes, recorded, write_verdict
from vitdet.stages.plan import plan_trainings
from vitdet.stages.workspace import run_folder
from vitdet.tracking.address import run_page
from vitdet.tracking.comparison import compare
from vitdet.tracking.mlflow import connect
from vitdet.tracking.table import mean_deviation, page, trainings_table

RUN = "0123456789abcdef"


def verdict(name: str, ap: float) -> dict:
    protocol = {"val_fingerprint": "f1", "evaluate_settings": "s"}
    run = {"name": name, "run_id": "", "metrics": {"box_ap": ap}, **protocol}
    return {**run, "passed": False, "reason": "no better"}


@pytest.fixture
def names(tmp_path: Path) -> list[str]:
    """Return the names of a pipeline run's trainings: two settings with two seeds each."""
    planned = plan_trainings(["tiny"], [], str(tmp_path), ["optim.lr=0.1,0.2"], 2)
    for name, (config, _) in planned.items():
        save_config(config, run_folder(str(tmp_path), RUN) / f"{name}.yaml")
    return list(planned)


def test_the_table_has_finished_runs_and_the_reasons_of_failures(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, page = str(tmp_path), tmp_path / "page.html"
    for name, ap in zip(names[:3], (10.0, 12.0, 30.0), strict=True):
        write_verdict(space, name, RUN, verdict(name, ap))
    with pytest.raises(RuntimeError), recorded(space, names[3], RUN, "train"):
        raise RuntimeError("loss <nan> | step 3\nmore")
    text = stages.compare_finished(space, RUN, str(page))

    rows = [[cell.strip() for cell in line.split(" | ")] for line in text.splitlines()]
    over_seeds = {row[1]: row[2:4] for row in rows if row[0] == "| tiny"}
    assert over_seeds == {"optim.lr=0.1": ["2", "11.00 ± 1.41"], "optim.lr=0.2": ["1", "30.00"]}
    best, *_, failed = [row for row in rows if row[0].startswith("| tiny-")]
    assert best[:3] == [f"| {names[2]}", "optim.lr=0.2, train.seed=0", "30.00"]
    assert failed[0] == f"| {names[3]}"
    assert "train failed: loss <nan> \\| step 3 |" in text
    assert "train failed: loss &lt;nan&gt; | step 3</td>" in page.read_text()
    client = connect("", tmp_path / "runs")
    (parent,) = client.search_runs(["1"], f"tags.group = '{RUN}'")
    assert "best" not in parent.data.tags  # the parent run will end as FAILED
    assert client.list_artifacts(parent.info.run_id)[0].path == "comparison.md"

    # then the failed step is repeated, and rows have links to MLflow's UI
    with recorded(space, names[3], RUN, "train"):
        pass
    write_verdict(space, names[3], RUN, verdict(names[3], 31.0))
    monkeypatch.setenv("MLFLOW_UI_URL", "https://mlflow.example.com/")
    assert "31.00" in stages.compare_finished(space, RUN, str(page))
    link = f"https://mlflow.example.com/#/experiments/1/runs/{parent.info.run_id}"
    assert link in page.read_text()
    assert client.get_run(parent.info.run_id).data.tags["best"] == names[3]


def test_a_run_without_any_record_did_not_finish(names: list[str], tmp_path: Path) -> None:
    verdicts, failures = read_outcomes(str(tmp_path), names, RUN)
    assert not verdicts
    assert failures == dict.fromkeys(names, "did not finish: see the logs of the pipeline's steps")
    assert stages.compare_finished(str(tmp_path), "another-run", str(tmp_path / "page")) == ""


def test_names_and_tables_that_mlflow_limits_are_shortened(tmp_path: Path) -> None:
    """Recipe files may have any name, and MLflow limits run names (250) and tags (5000, now 8000)."""
    several = [f"{'x' * 90}{number}-12345678" for number in range(3)]
    many = [f"lr=1e-{number} (a+b), 训练-12345678" for number in range(64)]
    store = {"uri": "", "folder": tmp_path, "experiment": "e"}
    for names in (several, many):
        rows = [{**verdict(name, 10.0), "reason": "no better" * 8} for name in names]
        compare(names[0], rows, {}, {}, **store, model_name="m")
    client = connect("", tmp_path)
    second, first = client.search_runs(["1"])
    assert first.info.run_name.startswith("pipeline xxx") and len(first.info.run_name) == 250
    assert second.data.metrics["box_ap/lr_1e-63 _a_b__ 训练-12345678"] == 10.0
    note = second.data.tags["mlflow.note.content"]
    assert note.endswith(" |\n\n... The whole text is in the artifact `comparison.md`.")
    assert 4800 < len(note) <= 5000


def test_links_are_in_markdown_and_html() -> None:
    link = "http://mlflow:5000/#/experiments/1/runs/abc"
    table = trainings_table([verdict("a-1", 1.0)], {}, {}, None, {}, {"a-1": link})
    assert f"| [a-1]({link}) | 1.00 |" in table.markdown()
    assert f'href="{link}">a-1</a>' in page("", [], [table])


def test_mean_and_deviation_have_two_decimals() -> None:
    found = [mean_deviation(values) for values in ([], [1.0], [1.0, 3.0])]
    assert found == ["-", "1.00", "2.00 ± 1.41"]


def test_seeds_start_from_the_configured_seed() -> None:
    planned = plan_trainings(["tiny"], ["train.seed=5"], "", seeds=3)
    assert [config.train.seed for config, _ in planned.values()] == [5, 6, 7]
    assert load_config("tiny").train.seed == 0


@pytest.mark.parametrize("user", ["", "me@", "me:pass@", "me:pa/ss@", "me:p@ss@"])
def test_a_link_to_a_run_has_no_credentials(user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_UI_URL", raising=False)
    link = "https://mlflow.team.org/#/experiments/1/runs/r"
    assert run_page(f"https://{user}mlflow.team.org/", "1", "r") == link
    monkeypatch.setenv("MLFLOW_UI_URL", f"https://{user}mlflow.team.org")
    assert run_page("http://mlflow:5000", "1", "r") == link
    monkeypatch.delenv("MLFLOW_UI_URL")
    assert run_page("sqlite:///mlflow.db", "1", "r") == ""
