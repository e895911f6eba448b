"""Each benchmark runs from its command to its JSON file and plot, on models of two layers."""

import json
import pathlib
import runpy
import sys

import numpy as np
import pytest

import lora_jax as lj
from lora_jax import pretrained

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
# What transformers and peft say of themselves is no fault of the benchmarks.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]


@pytest.fixture
def command(monkeypatch, tmp_path):
    """command("benchmark_step", "--rounds", "1", …) -> what it wrote as JSON."""

    def run(name, *options):
        out = tmp_path / f"{name}.json"
        monkeypatch.syspath_prepend(str(EXPERIMENTS))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options), "--out", str(out)])
        runpy.run_path(str(EXPERIMENTS / f"{name}.py"), run_name="__main__")
        found = json.loads(out.read_text())
        assert found["command"].endswith(str(out)) and found["versions"]["jax"]
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        return found

    return run


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("e2e") / "pairs.csv"
    rows = [f'"name[Inn {i}], food[{"x" * (i % 5 + 1)}]",Inn {i} serves x.' for i in range(24)]
    path.write_text("mr,ref\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    import jax

    hf = {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 60,
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "hidden_act": "gelu", "max_position_embeddings": 64,
        "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0,
    }  # fmt: skip
    model = pretrained.build_model(hf)
    params = model.init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    folder = tmp_path_factory.mktemp("encoder")
    lj.save_pretrained(folder, model, params)
    return folder


def test_step_of_a_decoder(command, tiny_base):
    pytest.importorskip("peft")
    found = command("benchmark_step", "--model", tiny_base / "base", "--rounds", 2,
                    "--batch", 2, "--length", 16)  # fmt: skip
    assert set(found["seconds"]) == {"ours", "hand", "full", "peft"}
    assert all(len(values) == 2 for values in found["seconds"].values())
    losses = list(found["first_losses"].values())
    np.testing.assert_allclose(losses, losses[0], rtol=1e-4)  # the arms compute one function
    assert found["ratios"]["ours/peft"]["median"] > 0


def test_step_of_an_encoder(command, encoder):
    pytest.importorskip("peft")
    found = command("benchmark_step", "--model", encoder, "--rounds", 2, "--batch", 4,
                    "--length", 16)  # fmt: skip
    assert set(found["seconds"]) == {"ours", "peft"}
    ours, theirs = found["first_losses"]["ours"], found["first_losses"]["peft"]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    counts = found["trainable_parameters"]
    assert counts["ours"] == counts["peft"]  # the scores' layer included


def test_end_to_end(command, tiny_base, pairs):
    pytest.importorskip("peft")
    found = command(
        "benchmark_end_to_end", "--data", pairs, "--pairs", 20, "--model", tiny_base / "base",
        "--rows", 2, "--length", 192, "--batch", 3, "--chunk", 32, "--turn", 2, "--full",
    )  # fmt: skip
    turns, rates = found["turns"], found["rates"]
    assert found["examples"] == 20  # of 24: --pairs counts
    for name in ("ours", "padded", "packed"):
        assert rates[name]["examples"] >= 20  # a whole epoch
        assert 0 < rates[name]["fill"] <= 1
        assert found["memory"][name]["peak"] > found["memory"][name]["before_training"] // 2
    # The packed arms train on the same batches from the same start.
    for ours, peer in zip(turns["ours"], turns["packed"], strict=True):
        assert (ours["examples"], ours["tokens"]) == (peer["examples"], peer["tokens"])
        np.testing.assert_allclose(ours["loss"], peer["loss"], rtol=1e-4)
    assert turns["ours"][-1]["loss"] < turns["ours"][0]["loss"]
    assert found["adapter_bytes"]["ours"] > 0
    by_hand = turns["padded"][0]["seconds"] / turns["padded"][0]["examples"]
    by_hand /= turns["ours"][0]["seconds"] / turns["ours"][0]["examples"]
    spread = found["speed_up"]["padded"]
    assert spread["min"] <= by_hand <= spread["max"]


def test_batches_for_transformers(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import end_to_end_arms
    import torch_peer

    examples = [
        {"tokens": np.arange(1, n + 1, dtype=np.int32), "loss_mask": np.arange(n) >= n - 2}
        for n in (3, 5)
    ]
    batch = torch_peer.collate(examples, pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9, 9], [1, 2, 3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, -100], [-100, -100, -100, 4, 5]]
    packed = {
        "tokens": np.array([[1, 2, 3, 4, 0]]), "positions": np.array([[0, 1, 0, 1, 0]]),
        "loss_mask": np.array([[0.0, 1, 0, 1, 0]]), "segment_ids": np.array([[1, 1, 2, 2, 0]]),
    }  # fmt: skip
    counted = end_to_end_arms.Counted(iter([packed, batch]), lambda b: b)
    theirs = torch_peer.packed(next(counted))
    assert theirs["labels"].tolist() == [[-100, 2, -100, 4, -100]]
    seen = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert theirs["attention_mask"][0, 0].astype(int).tolist() == seen
    assert (counted.examples, counted.tokens, counted.slots) == (2, 4, 5)
    next(counted)
    assert (counted.examples, counted.tokens, counted.slots) == (4, 12, 15)


def test_an_arm_that_ends_early_says_so(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import benchmarking

    (tmp_path / "arm.py").write_text(
        f"import sys\nsys.path.insert(0, {str(EXPERIMENTS)!r})\nimport benchmarking\n"
        "print('a library talks')\n"
        "benchmarking.serve({'double': lambda x: print('and again') or 2 * x, 'end': sys.exit})\n"
    )
    with benchmarking.Process(tmp_path / "arm.py") as arm:
        assert [arm.ask("double", x=x) for x in (1, 2)] == [2, 4]
        with pytest.raises(SystemExit, match="arm.py ended with status 0"):
            arm.ask("end")


def test_peak_memory_is_this_process_s(monkeypatch):
    """A child of a large process would report its parent's peak as `ru_maxrss`."""
    import subprocess

    ballast = np.ones(100_000_000)  # 800 MB, touched
    code = "from lora_jax import host; print(host.peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], cwd=EXPERIMENTS, check=True,
                          stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert 0 < int(done.stdout) < ballast.nbytes / 2
