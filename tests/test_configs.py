"""Every config builds, is complete, and names only what exists."""

import json
import pathlib

import pytest

from lora_jax import config, experiment
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
