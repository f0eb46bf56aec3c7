"""The adapter in EleutherAI's harness, with tiny tasks that need no download.

`.ci/run` runs these tests in an environment that has the extra "lm-eval"; others skip them.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from goose_jax.text import ByteTokenizer
from tests.goose_jax.harness_tasks import CHOICES, QUESTIONS, expected_score, expected_text
from tests.goose_jax.official_weights import GOLDEN, golden_model

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("module_quick_to_compile"),
    pytest.mark.filterwarnings("default"),  # those of the harness and its dependencies
]

ROWS = [
    {"question": question, "choices": choices, "answer": i % 2, "text": f"The number {i}."}
    for i, (question, choices) in enumerate(zip(QUESTIONS, CHOICES, strict=True))
]
CHOOSE = {
    "task": "choose",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "target_delimiter": "",  # the choices begin with a space
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
}
READ = {
    "task": "read",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}
WRITE = {
    "task": "write",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
    "metric_list": [{"metric": "exact_match"}],
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def documents(**_):
    import datasets

    return {"test": datasets.Dataset.from_list(ROWS)}


def expected_accuracy():
    scores = [
        [expected_score(q, c)[0] for c in choices]
        for q, choices in zip(QUESTIONS, CHOICES, strict=True)
    ]
    return np.mean([np.argmax(s) == row["answer"] for s, row in zip(scores, ROWS, strict=True)])


@pytest.fixture
def results(monkeypatch, tmp_path):
    from goose_jax.evaluation.harness import GooseLM

    for name, value in (OFFLINE | {"HF_HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    return lm_eval.simple_evaluate(
        model=GooseLM(golden_model(), tokenizer=ByteTokenizer(), batch_size=4),
        tasks=[
            task | {"custom_dataset": documents, "test_split": "test"}
            for task in (CHOOSE, READ, WRITE)
        ],
        bootstrap_iters=0,
    )


def test_results_of_all_kinds_of_requests(results):
    samples = {
        task: {sample["doc"]["question"]: sample for sample in of_task}
        for task, of_task in results["samples"].items()
    }
    for row in ROWS:
        question = row["question"]
        chosen = samples["choose"][question]["resps"]
        for choice, [(log_likelihood, greedy)] in zip(row["choices"], chosen, strict=True):
            expected = expected_score(question, choice)
            assert float(log_likelihood) == pytest.approx(expected[0], abs=1e-4)
            assert greedy == expected[1]
        [[whole]] = samples["read"][question]["resps"]
        assert float(whole) == pytest.approx(expected_score("", row["text"])[0], abs=1e-4)
        assert samples["write"][question]["resps"] == [[expected_text(question, 6, stop="\n")]]
    metrics = results["results"]
    assert metrics["choose"]["acc,none"] == pytest.approx(expected_accuracy())
    nats = -sum(expected_score("", row["text"])[0] for row in ROWS)
    num_bytes = sum(len(row["text"].encode()) for row in ROWS)
    bits = nats / np.log(2) / num_bytes
    assert metrics["read"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)


def test_the_command_of_the_harness_knows_the_model(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = CHOOSE | {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
    }
    (tmp_path / "choose.yaml").write_text(json.dumps(task))  # YAML reads JSON
    arguments = [
        *("--model", "goose-jax", "--tasks", "choose", "--batch_size", "4"),
        *("--model_args", f"pretrained={GOLDEN / 'tiny_official.pth'},tokenizer=byte"),
        *("--include_path", str(tmp_path), "--output_path", str(tmp_path / "results")),
    ]
    subprocess.run(
        [sys.executable, "-m", "goose_jax.evaluation", "run", *arguments],
        env=os.environ | OFFLINE | {"HF_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        check=True,
        capture_output=True,
        text=True,
    )
    [file] = (tmp_path / "results").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["choose"]
    assert found["acc,none"] == pytest.approx(expected_accuracy())
