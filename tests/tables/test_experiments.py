"""Tables of experiments/ whose cells are computed by code of their own, run at smoke scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pandas as pd
import pytest

from lora_jax import config as configs
from lora_jax import tables
from lora_jax.methods.base import Method
from lora_jax.plan.sketch import Sketch
from lora_jax.sweeps import grid

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def smoke(tmp_path: Path) -> Any:
    """smoke("lora_table1") -> measured values by (row, metric)."""

    def run(name: str) -> pd.Series:
        table = tables.load(str(EXPERIMENTS / f"{name}.py"), "smoke")
        filled = tables.run(table, "smoke", tmp_path, progress=False)
        return filled.frame().set_index(["row", "metric"])["measured"]

    return run


def test_latency_of_all_arms(smoke: Any) -> None:
    found = smoke("lora_table1")["two layers, 2 x 8"]
    assert set(found.index) == {
        "FT (ms)", "LoRA merged (ms)", "LoRA merged overhead (%)", "LoRA beside (ms)",
        "LoRA beside overhead (%)", "AdapterL (ms)", "AdapterL overhead (%)", "AdapterH (ms)",
        "AdapterH overhead (%)",
    }  # fmt: skip
    assert (found.filter(like="(ms)") > 0).all()  # times themselves are not for a test


def test_inside_of_adapters_across_ranks_and_seeds(
    tmp_path: Path, tiny_config: Any, monkeypatch: Any
) -> None:
    """One step of a two-layer model: projections, similarities, and their figures."""
    config = tmp_path / "config.py"
    config.write_text(f"def get_config():\n    return {tiny_config()!r}\n")
    module = configs.load_module(str(EXPERIMENTS / "lora_table7.py"))
    monkeypatch.setattr(module, "CONFIG", str(config))
    monkeypatch.setitem(module.SHORT, "data.validation", "[20:22]")
    table = module.table("smoke")
    filled = tables.run(table, "smoke", tmp_path, progress=False)
    found = filled.frame().set_index(["row", "metric"])["measured"]
    norms = found["Table 7: ‖UᵀWqVᵀ‖, r=4"]
    # W's own directions hold most of it, any others less.
    assert 0 < norms["of ΔWq"] <= norms["of Wq"] <= norms["‖Wq‖"]
    assert norms["amplification"] == pytest.approx(norms["‖ΔWq‖"] / norms["of ΔWq"])
    phi = found["Figure 3: r=8 and r=64"]
    assert phi.between(0, 1).all() and len(phi) == 6
    assert (tmp_path / "smoke" / "figures" / "rank8_rank64.png").stat().st_size > 1000


BERT = {
    "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 60, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 6, "num_attention_heads": 4,
    "hidden_act": "gelu", "max_position_embeddings": 64, "type_vocab_size": 2,
    "layer_norm_eps": 1e-12, "pad_token_id": 0,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 60,
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "path",
    sorted(p for p in EXPERIMENTS.glob("*.py") if "def table(scale" in p.read_text()),
    ids=lambda p: p.stem,
)
def test_methods_of_small_rows_fit_their_models(path: Path) -> None:
    """Each trained row's method starts, with all of its fields, on a small model of that family."""
    for row in tables.load(str(path), "small").rows:
        if not isinstance(row.work, tables.Trained):
            continue
        experiment = grid.configured(row.work.config, row.work.overrides)
        if experiment.data.task.head not in ("lm", "classification"):
            continue
        shape = LLAMA if experiment.data.task.head == "lm" else BERT
        chosen = {**row.work.overrides, "model.shape": shape}
        bench = Sketch(grid.configured(row.work.config, chosen))
        method = bench.experiment.method.scheduled(experiment.training.steps)
        assert method.count(bench.params).total > 0
        if type(method).prepare is not Method.prepare:
            continue  # its start needs a look at data
        trainable = jax.eval_shape(lambda p, m=method: m.init(jax.random.key(0), p), bench.params)
        assert sum(x.size for x in jax.tree.leaves(trainable)) > 0


def test_the_articles_claims(
    tmp_path: Path, tiny_base: Path, tiny_config: Any, monkeypatch: Any
) -> None:
    """Counts at GPT-3's shape, a latency, general text before and after, errors over rates."""
    words = [{"word": w, "phonemes": " ".join(w), "references": [" ".join(w)]}
             for w in ("cat", "tac", "act", "at", "ta", "ca")]  # fmt: skip
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, words)))
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 40)
    data = {"source": {"kind": "files", "path": str(tmp_path / "words.jsonl"), "split": "[:4]"},
            "task": {"kind": "g2p"}}  # fmt: skip
    config = tmp_path / "config.py"
    config.write_text(f"def get_config():\n    return {tiny_config(data=data)!r}\n")
    module = configs.load_module(str(EXPERIMENTS / "article_claims.py"))
    monkeypatch.setattr(module, "QUICKSTART", config)
    monkeypatch.setattr(module, "MODEL", str(tiny_base / "base"))
    monkeypatch.setitem(module.SHORT, "data.validation", "[4:]")
    monkeypatch.setenv("GENERAL_TEXT", str(tmp_path / "text.txt"))
    filled = tables.run(module.table("smoke"), "smoke", tmp_path, progress=False)
    found = filled.frame().set_index(["row", "metric"])["measured"]
    # The paper's section 4.2: 350 GB to 35 MB, and 1.2 TB to 350 GB.
    assert found["parameters: all / trained, GPT-3, r=4", "ratio"] == pytest.approx(9251, abs=1)
    assert 0.1 < found["training memory: LoRA / full, GPT-3, r=4", "ratio"] < 1 / 3
    assert found.notna().all()
    assert found["P-tuning v2", "loss on general text"] > 0

    monkeypatch.setitem(module.SPREAD, "LoRA", (1e-3, 1e-1))
    cells = module.spread("LoRA", 3, tmp_path / "spread", 0)
    errors = [cells[f"phoneme error rate, rate {rate:g}"]["value"] for rate in (1e-3, 1e-1)]
    assert cells[module.WORST]["value"] == max(errors) - min(errors)
