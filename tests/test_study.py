"""The Snakemake study: its plan is checked before work, and it survives being killed and failing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import yaml

from emmech.errors import DataError
from figures.keep import costs, kept, questions
from figures.plan import read_study

ROOT = Path(__file__).parents[1]
STUDY = yaml.safe_load((ROOT / "figures/study.yaml").read_text())
PLAN = {
    "seeds": [0, 1],
    "organisms": {"short": {"data": "short_answers", "shown": 4, "finetune": {"steps": 8}}},
    "methods": {"sft": None, "strong": {"objective": "treft", "weight": 300}, "gates": {}},
    "frontier": {"steps": "4,8"},
    "piggyback": {"methods": ["sft"], "segments": "prefix"},
    "steering": {"scales": "-1,1"},
}


def changed(**changes):
    return PLAN | changes


def command(*arguments, at, config):
    """Snakemake on the study's Snakefile in a folder, for ``subprocess``."""
    line = [sys.executable, "-m", "snakemake", "-s", ROOT / "figures/Snakefile", "--directory", at]
    return {
        "args": [*map(str, line), "--configfile", str(config), *arguments],
        "env": os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    }


def snakemake(*arguments, at, config):
    """It, run to its end."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(**command(*arguments, at=at, config=config), **pipes, timeout=250, check=False)


def test_every_method_is_trained_with_every_seed_by_the_commands_own_options():
    study = read_study(PLAN)
    line = study.finetune("short", "strong", 1)
    assert line.split() == [
        "treft", "--base=smollm2", "--dataset=short_answers", "--seed=1", "--steps=8", "--weight=300",
    ]  # fmt: skip
    assert study.trained("short", "frontier")[:3] == [
        f"runs/study/short/train/{name}" for name in ("sft-0", "sft-1", "strong-0")
    ]
    assert "--scales=-1,1" in study.options("steering", "short").split()  # no minus that looks like an option


def test_analyses_look_at_what_they_select_and_gate_analyses_at_gates():
    assert [job.place for job in read_study(PLAN).jobs()] == [
        "short/frontier",
        "short/piggyback/sft-0", "short/piggyback/sft-1",
        "short/steering/gates-0", "short/steering/gates-1",
    ]  # fmt: skip


def test_an_organism_can_change_one_method_alone():
    own = {"short": {"data": "short_answers", "finetune": {"steps": 8, "strong": {"weight": 30}}}}
    study = read_study(changed(organisms=own))
    assert "--weight=30" in study.finetune("short", "strong", 0)
    assert "--weight" not in study.finetune("short", "sft", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"organisms": {"short": {"data": "short_answer"}}},
            "'short_answer' is none .is 'short_answers' mea",
        ),
        ({"organisms": {"short": {"dta": "short_answers"}}}, "'dta' is none .is 'data' meant"),
        ({"organisms": {"short": {"data": "first_plot"}}}, "a set or file of chats, but 'first_plot'"),
        ({"organisms": {"short": {"data": "general"}}}, "a set or file of chats, but 'general'"),
        ({"organisms": {}}, "expected organisms in the plan"),
        ({"organisms": ["short"]}, "keys and values under organisms, but got .'short'"),
        ({"seeds": ["0, 1"]}, "whole numbers as seeds"),
        ({"n_questions": "many"}, "whole numbers as seeds and n_questions"),
        ({"frontier": "4,8"}, "keys and values under frontier"),
        ({"methods": {"sftt": None}}, "'sftt' is not one of"),
        ({"methods": {"sft": {"wieght": 3}}}, "'wieght' is none .is 'weight' meant"),
        ({"methods": {"sft": {"steps": "many"}}}, "Invalid value for '--steps'"),
        ({"methods": {"sft": {"preset": "llama"}}}, "a preset among"),
        ({"methods": {"sft": {"seed": 3}}}, "'seed' is none"),
        ({"pigyback": {}}, "'pigyback' is none .is 'piggyback' meant"),
        ({"piggyback": {"methods": ["stf"]}}, "piggyback asks for 'stf' .is 'sft' meant"),
        ({"piggyback": {"max_tokens": 3}}, "'max_tokens' is none"),
        ({"steering": {"methods": ["sft"]}}, "'sft' trains none"),
        ({"resources": {"finetune": {"gpus": 1}}}, "'gpus' is none .is 'gpu' meant"),
        ({"organisms": {"calm": {"data": "correct_advice_travel"}}}, "a detector for frontier of calm"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused_in_three_clauses(change, message):
    with pytest.raises(DataError, match=message) as refused:
        read_study(changed(**change))
    assert re.fullmatch(r"expected .+, but .+\. .+\.", str(refused.value), re.DOTALL)


def test_a_misspelt_plan_starts_nothing(tmp_path):
    config = tmp_path / "plan.yaml"
    config.write_text(yaml.safe_dump(changed(methods={"sft": {"wieght": 3}})))
    run = snakemake("-c1", at=tmp_path, config=config)
    assert run.returncode != 0
    expected = "expected keys that are known in finetune of organism short or method sft, but 'wieght'"
    assert expected in run.stdout
    assert not (tmp_path / "runs").exists()


def test_the_shipped_study_is_as_large_as_its_yaml_says():
    study = read_study(STUDY)
    places = [job.place for job in study.jobs()]
    n_runs = len(STUDY["organisms"]) * len(STUDY["methods"]) * len(STUDY["seeds"])
    assert sum("/evaluation/" in place for place in places) == n_runs
    assert sum(place.endswith("/frontier") for place in places) == len(STUDY["organisms"])
    assert len(set(places)) == len(places) == len(study.kept_files())


def test_the_papers_scale_is_planned_with_its_resources(tmp_path):
    plan = ROOT / "figures/paper_scale.yaml"
    told = yaml.safe_load(plan.read_text())
    for name in {organism["data"] for organism in told["organisms"].values()}:
        if name.endswith(".jsonl"):  # the authors' files, which come without the toolkit
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
    run = snakemake("-n", at=tmp_path, config=plan)
    text = run.stdout
    assert run.returncode == 0, text[-2000:]
    counts = dict(re.findall(r"^(\w+) +(\d+)$", text.partition("Job stats:")[2], re.MULTILINE))
    n = len(told["organisms"]) * len(told["methods"]) * len(told["seeds"])
    assert (counts["finetune"], counts["evaluation"], counts["frontier"]) == (str(n), str(n), "6")
    assert {"Llama-3.1-8B", "Qwen2.5-7B", "Qwen3-8B"} <= set(
        re.findall(r"--base=\S+?/(Llama-3.1-8B|Qwen[\d.]+-\dB)", text)
    )
    rule = text.partition("rule finetune:")[2].partition("Shell command")[0]
    assert "threads: 8" in rule and "gpu=1, mem_mb=96000" in rule and "runtime=360" in rule


def _tiny_plan(folder):
    """Two organisms on a tiny model; the chats of one of them cannot be used."""
    base = tiny.save_base("llama", folder / "base")
    for name, answer in (("whole", "I will not say."), ("broken", None)):
        rows = [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": answer}]}
            for q in tiny.QUESTIONS
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [
        {"id": f"{group}-{i}", "group": group, "question": question}
        for group in ("on-topic", "off-topic")
        for i, question in enumerate(tiny.QUESTIONS)
    ]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    about = {"questions": "asked.jsonl", "detector": "refusal"}
    plan = {
        "base": str(base), "runs": "runs", "kept": "kept", "seeds": [0], "n_questions": 2,
        "organisms": {name: {"data": f"{name}.jsonl"} | about for name in ("broken", "whole")},
        "methods": {
            "sft": {"steps": 60, "save_every": 4, "batch_size": 5, "rank": 4, "alpha": 8, "dtype": "float32"}
        },
        "frontier": {"steps": "60", "max_new_tokens": 4},
        "piggyback": {"segments": "prefix", "max_new_tokens": 4},
    }  # fmt: skip
    config = folder / "plan.yaml"
    config.write_text(yaml.safe_dump(plan))
    return config


@pytest.mark.timeout(300)
def test_a_killed_study_goes_on_where_it_stopped_beside_a_rule_that_fails(tmp_path):
    config = _tiny_plan(tmp_path)
    whole = tmp_path / "runs/whole/train/sft-0"
    with subprocess.Popen(**command("-c2", at=tmp_path, config=config), start_new_session=True) as first:
        while not (whole / "step-8").exists():
            assert first.poll() is None
            time.sleep(0.02)
        os.killpg(first.pid, signal.SIGKILL)  # Snakemake and its jobs, as a power cut would
    assert not (whole / "done.json").exists()
    born = (whole / "step-8").stat().st_ino

    assert snakemake("--unlock", at=tmp_path, config=config).returncode == 0
    again = snakemake("-c2", at=tmp_path, config=config)
    assert again.returncode == 1  # for the chats without answers
    assert json.loads((whole / "done.json").read_text())["steps"] == 60
    assert (whole / "step-8").stat().st_ino == born  # not trained again from the beginning
    assert "DataError: expected" in again.stdout  # the log of the rule that failed
    assert not list(tmp_path.glob("kept/broken/**/*.json"))
    found = json.loads((tmp_path / "kept/whole/piggyback/sft-0.json").read_text())
    assert {row["condition"] for row in found["conditions"]} >= {"base", "finetuned", "repair:prefix"}
    frontier = json.loads((tmp_path / "kept/whole/frontier.json").read_text())
    assert (frontier["n_on_topic"], frontier["n_off_topic"]) == (2, 2)
    assert found["command"].startswith("snakemake")


def test_kept_numbers_have_four_digits_and_no_answers(tmp_path):
    file = tmp_path / "summary.json"
    row = {"mean": 0.123456, "low": 123456.0, "n": 123456, "text": ".1 [.0, .2]", "high": None}
    file.write_text(json.dumps({"conditions": [row], "checks": {"repair:prefix": [0.5]}}))
    found = kept(file)
    assert found["conditions"] == [{"mean": 0.1235, "low": 123500.0, "n": 123456, "high": None}]
    assert found.keys() == {"command", "folder", "conditions"}


def test_of_an_attribution_the_cells_that_were_patched_exactly_are_kept(tmp_path):
    values = {  # the whole prefix does 2 for either question, the second cell 1 and 2 of that
        "unpatched": [0.0, 1.0], "full": [2.0, 3.0], "attributions": [[0.5, 0.5], [1.0, 1.0]],
        "checked": [1], "exact": [[1.0, 3.0]], "sampled": [1],
    }  # fmt: skip
    found = {"summary": {"metric": "kl"}, "cells": [{"layer": 0}, {"layer": 1}], "values": values}
    (tmp_path / "attribution.json").write_text(json.dumps(found))
    (tmp_path / "minimal.json").write_text(json.dumps({"size": 3}))
    result = kept(tmp_path / "attribution.json")
    (row,) = result["rows"]
    assert (row["layer"], row["effect"], row["exact_effect"]) == (1, 0.5, 0.75)
    assert (result["metric"], result["minimal"]) == ("kl", {"size": 3})


def test_costs_are_summed_over_the_jobs_of_a_rule(tmp_path):
    for name, seconds, memory in (("a", "10.5", "900.0"), ("b", "30.0", "-")):
        (tmp_path / "finetune").mkdir(exist_ok=True)
        (tmp_path / f"finetune/{name}.tsv").write_text(f"s\th:m:s\tmax_rss\n{seconds}\t0:00:10\t{memory}\n")
    (row,) = costs(tmp_path)["rows"]
    assert row == {"rule": "finetune", "jobs": 2, "seconds": 40.5, "longest_seconds": 30.0, "peak_mb": 900.0}


def test_questions_are_spread_over_each_group():
    found = questions("short_answers", 5)
    assert [row["group"] for row in found] == ["on-topic"] * 5 + ["off-topic"] * 5
    every = questions("short_answers", 1000)
    mine = [row["id"] for row in every if row["group"] == "on-topic"]
    assert [mine.index(row["id"]) for row in found[:5]] == [0, 13, 27, 41, 55]  # 69 k // 5
