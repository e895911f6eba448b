"""Every config builds, is complete, names only what exists, and runs."""

import json
import pathlib

import pytest

from lora_jax import cli, config, experiment
from lora_jax.tables import published

CONFIGS = sorted(pathlib.Path("configs").glob("*.py"))
ARGUMENTS = {
    "glue.py": ["", "task=mnli", "task=stsb,start=runs/mnli/adapter,model=roberta-base"],
    "e2e.py": ["", "folder=data,model=gpt2"],
    "gpt3_175b.py": ["", "full"],
    "mnist.py": ["", "net=lenet,dimension=290,projection=dense", "dimension=0,shuffle"],
    "aghajanyan.py": [
        "",
        "method=did,random,embeddings=False",
        "method=lora,dimension=4",
        "method=full",
    ],
}


@pytest.mark.parametrize(
    "spec", [f"{p}:{a}".removesuffix(":") for p in CONFIGS for a in ARGUMENTS.get(p.name, [""])]
)
def test_a_config_builds_and_is_complete(spec):
    parsed = experiment.from_dict(config.load_file(spec))
    complete = json.loads(json.dumps(experiment.to_dict(parsed)))
    assert experiment.to_dict(experiment.from_dict(complete)) == complete


@pytest.mark.parametrize("name", [p.stem for p in CONFIGS])
def test_a_config_runs(name, small_configs):
    """Two steps of it, on a model and data made here: see stand_ins.py."""
    command = ["run", f"configs/{name}.py", "--workdir", "runs/it", "--quiet"]
    assert cli.main(["--traceback", *command]) == 0
    result = json.loads((small_configs / "runs" / "it" / "result.json").read_text())
    assert result["metrics"] and result["trainable_params"] > 0
    assert result["config"]["training"]["steps"] == 2


def test_e2e_settings_are_the_published_ones():
    """The paper's Table 11, as it was transcribed."""
    table = published.frame("lora_t11_hparams_gpt2")
    row = table[table["dataset"] == "E2E"].iloc[0]
    parsed = experiment.from_dict(config.load_file("configs/e2e.py"))
    found = {
        "weight_decay": parsed.optimizer.weight_decay,
        "dropout": parsed.method.dropout,
        "batch_size": parsed.data.batch_size,
        "warmup_steps": parsed.optimizer.warmup_steps,
        "label_smoothing": parsed.training.label_smoothing,
        "lr": parsed.optimizer.learning_rate,
        "lora_r_q": parsed.method.rank,
        "lora_alpha": parsed.method.alpha,
        "beam_size": parsed.evaluation.num_beams,
        "length_penalty": parsed.evaluation.length_penalty,
        "no_repeat_ngram_size": parsed.evaluation.no_repeat_ngram_size,
    }
    assert {k: float(row[k]) for k in found} == found
