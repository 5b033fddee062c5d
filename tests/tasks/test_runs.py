"""Whole runs of language models: what is measured before, what is written, what an export is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import RunConfig
from fedlora.data.builtin.novels import novels_table
from fedlora.data.split import last_part
from fedlora.errors import AssetError
from fedlora.evaluation.adapter import evaluate_adapter
from fedlora.server.directory import RunDirectory
from fedlora.study.analyse.summary import summarise
from fedlora.study.report.findings import find
from fedlora.study.report.report import render
from fedlora.tasks.task import NO_INPUTS, Task
from tests.docs_commands import ROOT
from tests.study.made_up import result
from tests.tasks.test_language import jsonl, lm_config


def run(config: RunConfig, path: Path) -> dict[str, Any]:
    from fedlora.simulation.simulate import simulate

    return simulate(config, path)


@pytest.fixture(scope="module")
def written(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A run in which each client teaches which of its two letters follows which."""
    folder = tmp_path_factory.mktemp("lm")
    rows = [{"text": two * (20 + n), "domain": two} for two in ("ab", "cd") for n in range(20)]
    data = jsonl(folder / "letters.jsonl", rows)
    layers = "q_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    keys = {"data.name": data, "num-server-rounds": 2, "train.local-steps": 20, "train.learning-rate": 0.03}
    model = {"lora.target-modules": layers, "lora.rank": 8, "lora.alpha": 64.0}
    config = lm_config(**keys, **model, **{"data.domain-column": "domain", "engine.cohort-size": 2})
    return folder / "run", run(config, folder / "run"), data


def test_perplexity_falls_and_before_is_kept(written: tuple[Path, dict[str, Any], str]) -> None:
    path, outcome, _ = written
    before = RunDirectory(path, resume=True).before()
    assert outcome["before"] == before
    assert outcome["perplexity"] < 0.8 * before["perplexity"]
    assert set(outcome["perplexity_by_domain"]) == {"ab", "cd"}
    assert "majority_accuracy" not in outcome
    rounds = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
    assert all(record["perplexity"] > 0 for record in rounds)


def test_samples_continue_held_out_texts(written: tuple[Path, dict[str, Any], str]) -> None:
    path, _, _ = written
    samples = json.loads((path / "samples.json").read_text())
    assert [s["prompt"] for s in samples["before"]] == [s["prompt"] for s in samples["after"]]
    assert all(set(s["prompt"]) <= set("abcd") and s["prompt"] for s in samples["after"])
    assert samples["before"] != samples["after"]


def test_the_export_evaluates_to_what_the_run_says(written: tuple[Path, dict[str, Any], str]) -> None:
    path, outcome, data = written
    about = json.loads((path / "adapter" / "adapter_config.json").read_text())
    assert about["task_type"] == "CAUSAL_LM"
    found = evaluate_adapter(path / "adapter", data, text_column="text", label_column="label")
    assert found["perplexity"] < 0.8 * outcome["before"]["perplexity"]


def test_private_clients_train_language_models(cache: Path, tmp_path: Path) -> None:
    rows = [{"text": who * (40 + n), "domain": who} for who in "ab" for n in range(20)]
    keys = {"data.name": jsonl(tmp_path / "a.jsonl", rows), "privacy.mode": "example", "train.batch-size": 4}
    config = lm_config(**keys, **{"num-server-rounds": 1, "engine.cohort-size": 1})
    outcome = run(config, tmp_path / "run")
    assert outcome["epsilon"] <= 8.0


# --- novels ------------------------------------------------------------------------------------------


def test_the_last_part_of_a_text_begins_at_a_paragraph() -> None:
    text = "\n\n".join(f"Paragraph {n}." for n in range(100))
    before, after = last_part(text, 0.1)
    assert f"{before}\n\n{after}" == text
    assert 0.08 < len(after) / len(text) < 0.13
    assert last_part("one paragraph", 0.1) == ("", "one paragraph")


def test_without_apt_one_line_names_the_alternatives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssetError, match="apt-get is not here; the alternatives are a jsonl file") as error:
        novels_table()
    assert "\n" not in str(error.value)


# --- report ------------------------------------------------------------------------------------------


def test_a_report_of_language_models() -> None:
    def one(name: str, accuracy: float) -> Any:
        before = {"accuracy": 0.25, "perplexity": 90.0}
        found = result(
            name, accuracy=accuracy, outcome={"before": before, "perplexity": 40.0, "tokens": 9000}
        )
        del found.result["majority_accuracy"]
        sample = {"prompt": "It was <b>", "written": "a day", "text": "late"}
        found.samples.update(before=[sample], after=[{**sample, "written": "a night"}])
        return found

    runs = [one("fedavg", 0.3), one("flora", 0.24)]
    findings = find(summarise(runs))
    assert findings.headline.startswith("fedavg is the most accurate: 30.0% of 9,000 test tokens")
    assert findings.lines == ("Not past the model before training (25.0%): flora (24.0%).",)
    page = render("Novels", runs)
    assert "It was &lt;b&gt;" in page
    assert "a night" in page
    table = page[page.index(">Perplexity<") :]
    assert '<td class="number" data-value="90.0">90</td>' in table[table.index("the model before training") :]


def test_the_page_names_all_that_a_task_has() -> None:
    page = (ROOT / "docs" / "tasks.md").read_text().partition("\n## Adding a task\n")[2]
    has = {name for name in {*vars(Task), *Task.__annotations__} if not name.startswith("_")}
    assert len(has) > 12
    assert {name for name in {*has, *NO_INPUTS} - {"name"} if f"`{name}`" not in page} == set()
