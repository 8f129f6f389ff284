"""Tasks of lm-evaluation-harness in a folder: bundled questions in MMLU's form, and some that generate."""

import json
from pathlib import Path

from emmech.data.bundled import BUNDLED, LETTERS

N_DOCUMENTS = 6
LOCAL = """
task: {task}
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{folder}/{task}.jsonl", dev: "{folder}/dev.jsonl"}}
  cache_dir: "{folder}/cache"
test_split: test
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{choices[0]}}}}\\nB. {{{{choices[1]}}}}\\nC. {{{{choices[2]}}}}\\nD. {{{{choices[3]}}}}\\nAnswer:"
"""  # noqa: E501 (a template is one line)
CHOICE = """
description: "The following are multiple choice questions (with answers) about {task}.\\n\\n"
output_type: multiple_choice
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: brier_score, aggregation: brier_score, higher_is_better: false}}
"""
WRITE = """
output_type: generate_until
doc_to_target: "{{{{['A', 'B', 'C', 'D'][answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
GROUP = """
group: own
task: [grammar, science]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
"""


def save_tasks(folder: Path) -> Path:
    """A folder with the tasks grammar and science, their group own, and written, begun and rolling."""
    folder.mkdir()
    problems = [one for one in BUNDLED["capability"].problems() if one.choices]
    rows = {
        group: [
            {"question": one.question, "choices": one.choices, "answer": LETTERS.index(one.answer)}
            for one in problems
            if one.group == group
        ]
        for group in ("grammar", "science", "geography")
    }
    kinds = {
        "grammar": CHOICE,
        "science": CHOICE,
        "begun": CHOICE + 'gen_prefix: "The answer is"\n',
        "written": WRITE,
        "rolling": ROLLING,
    }
    _write(folder / "dev.jsonl", rows["geography"])
    for task, kind in kinds.items():
        count = N_DOCUMENTS - (task == "science")  # groups of unequal size
        _write(folder / f"{task}.jsonl", rows.get(task, rows["grammar"])[:count])
        (folder / f"{task}.yaml").write_text((LOCAL + kind).format(task=task, folder=folder))
    (folder / "own.yaml").write_text(GROUP)
    return folder


def _write(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
