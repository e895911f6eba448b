"""From a config to an adapter through the command line, on a tiny Llama made here."""

import json

import jax
import numpy as np
import pytest

from lora_jax import cli, config, experiment, models, pretrained
from lora_jax.errors import UserError

CONFIG = """
def get_config(arg=""):
    return {{
        "model": {{"source": {base!r}}},
        "method": {{"kind": "lora", "rank": 2, "targets": "all-linear"}},
        "data": {{
            "source": {{"kind": "files", "path": {data!r}, "split": "[:12]"}},
            "task": {{
                "kind": "text_to_text", "prompt_template": "{{a}}", "completion_template": "{{b}}"
            }},
            "validation": "[12:16]", "batch_size": 2, "length": 32,
        }},
        "training": {{"steps": 4, "save_every": 2, "log_every": 1}},
        "evaluation": {{"max_new_tokens": 3, "show": 1}},
    }}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model with its tokenizer, data, and a config over them."""
    import tokenizers
    from tokenizers import decoders, pre_tokenizers

    root = tmp_path_factory.mktemp("tiny")
    hf = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300,
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    model = pretrained.load.build_model(hf)
    params = model.init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    pretrained.save_pretrained(root / "base", model, params)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, "<end>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(root / "base" / "tokenizer.json"))
    (root / "base" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    rows = [json.dumps({"a": f"{i} and", "b": f"{i}"}) for i in range(16)]
    (root / "data.jsonl").write_text("\n".join(rows))
    text = CONFIG.format(base=str(root / "base"), data=str(root / "data.jsonl"))
    (root / "tiny.py").write_text(text)
    return root


def test_run_eval_merge_export(folder, capsys):
    work, tiny = folder / "run", str(folder / "tiny.py")
    command = ["run", tiny, "--workdir", str(work), "--quiet", "--config.method.rank=3"]
    assert cli.main(command) == 0
    result = json.loads((work / "result.json").read_text())
    assert result["config"]["method"]["rank"] == 3
    assert result["config"]["optimizer"]["b1"] == 0.9  # the saved config is complete
    assert set(result["metrics"]) == {"exact_match"}
    lines = (work / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0]
    assert cli.main(["eval", str(work)]) == 0
    assert cli.main(["export", str(work), str(folder / "out")]) == 0
    peft = json.loads((folder / "out" / "adapter_config.json").read_text())
    assert peft["peft_type"] == "LORA" and peft["r"] == 3
    assert cli.main(["merge", str(work), str(folder / "merged")]) == 0
    run, method, trainable = experiment.load_run(work)
    merged = pretrained.load_pretrained(folder / "merged")[1]
    for a, b in zip(
        jax.tree.leaves(merged), jax.tree.leaves(method.merge(run.params, trainable)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)
    capsys.readouterr()
    assert cli.main(command) == 2  # a finished run is never overwritten
    error = capsys.readouterr().err
    assert "finished run" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.rnak=4", "did you mean rank"),
        ("method.kind=lroa", "did you mean lora"),
        ("optimizer.learning_rate=fast", "learning_rate must be float"),
        ("data.loss=some", "loss"),
    ],
)
def test_bad_overrides_name_the_nearest(folder, override, message):
    with pytest.raises(UserError, match=message):
        experiment.from_dict(config.load_file(str(folder / "tiny.py")), [override])


def test_quickstart_builds_and_is_complete():
    parsed = experiment.from_dict(config.load_file("configs/quickstart.py:steps=20,seed=3"))
    assert (parsed.training.steps, parsed.seed) == (20, 3)
    again = experiment.from_dict(json.loads(json.dumps(experiment.to_dict(parsed))))
    assert experiment.to_dict(again) == experiment.to_dict(parsed)
    with pytest.raises(UserError, match="did you mean steps"):
        config.load_file("configs/quickstart.py:step=20")


def test_importing_the_package_loads_no_heavy_library():
    import subprocess
    import sys

    code = "import lora_jax, sys; print([m for m in ('orbax', 'tensorflow_datasets', 'pandas', "
    code += "'matplotlib', 'grain', 'torch') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    assert "llama" in models.FAMILIES
