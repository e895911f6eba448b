"""Presets: the published settings, as configs take them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lora_jax import experiment
from lora_jax.config import load_file
from lora_jax.errors import UserError
from lora_jax.tables import presets


def built(spec: str) -> experiment.Experiment:
    return experiment.from_dict(load_file(f"configs/{spec}"))


def test_cells_are_python_values() -> None:
    row = presets.row("lora_script_hparams", script="roberta_base_cola.sh")
    assert (row["lr"], row["num_gpus"], row["fp16"]) == (4e-4, 2, False)
    assert row["warmup_steps"] is None and row["model"] == "roberta-base"
    with pytest.raises(UserError, match="has 8 rows"):
        presets.row("lora_t09_hparams_roberta", config="RoBERTa-base LoRA")


def test_paper_and_scripts_of_one_task() -> None:
    """Where they disagree both are there: batch of one device or of all, alpha."""
    paper = built("glue.py:task=cola,preset=roberta-base")
    scripts = built("glue.py:task=cola,preset=roberta-base-scripts")
    assert (paper.data.batch_size, paper.method.alpha) == (32, 8.0)
    assert (scripts.data.batch_size, scripts.method.alpha) == (64, 16.0)
    for one in (paper, scripts):
        assert one.model.source == "FacebookAI/roberta-base"
        assert one.optimizer.learning_rate == 4e-4 and one.optimizer.warmup_fraction == 0.06
        assert one.data.length == one.data.task.max_length == 512
        assert one.training.steps == 80 * 8551 // one.data.batch_size


def test_adapters_and_changes_to_a_preset() -> None:
    found = built("glue.py:task=sst2,preset=roberta-large-adapter_h-6M,epochs=1")
    assert (found.method.name, found.method.size) == ("adapter_h", 64)
    assert found.training.steps == 67349 // 32  # the preset has 5 epochs


@pytest.mark.parametrize("name", presets.GLUE)
def test_every_preset_has_every_task(name: str) -> None:
    for task in ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"):
        try:
            found = presets.glue(name, task)
        except UserError as error:  # what configs cannot say is refused, not left out
            assert "deberta" in name
            assert "before the classifier" in str(error) or "warms up for 1000 steps" in str(error)
            continue
        numbers = [found[k] for k in ("batch", "epochs", "rate", "length", "rank")]
        assert all(x > 0 and math.isfinite(x) for x in numbers), found


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("deberta-xxl", "mnli"), "dropout 0.15 before the classifier"),
        (("roberta-bse", "cola"), "did you mean roberta-base"),
        (("roberta-base", "wnli"), "no task 'wnli'"),
    ],
)
def test_unknown_names(arguments: Any, match: str) -> None:
    with pytest.raises(UserError, match=match):
        presets.glue(*arguments)


def test_arguments_of_glue_that_make_no_run() -> None:
    for arg, match in (
        ("task=cola,examples=20000", "cola has 8551 examples"),
        ("epochs=0", "0 epochs of"),
        ("batch=0", "batches of 0"),
        ("task=cola,examples=10", "3 epochs of 10 examples in batches of 32"),
        ("method=bitfit", "neither rank nor size"),
    ):
        with pytest.raises(UserError, match=match):
            built(f"glue.py:{arg}")


@pytest.mark.parametrize("name", ["full", "dora", "vera", "adapter_h", "lora_xs"])
def test_methods_of_a_size_by_glues_arguments(name: str) -> None:
    found = built(f"glue.py:method={name},rank=4")
    assert found.method.name == name
    assert getattr(found.method, "rank", getattr(found.method, "size", 4)) == 4
    t = found.training  # an evaluation an epoch, none just before the last
    assert t.steps == 3 * 67349 // 32 and 2 * t.eval_every < t.steps <= 3 * t.eval_every
