"""Prefixes and prompts both ways between PEFT and here: the same logits."""

from __future__ import annotations

import inspect
import json

import jax
import numpy as np
import pytest
from peft_models import BERT, GPT2, LLAMA, TOKENS, fresh
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax import partition
from lora_jax.methods.prefix import PrefixTuning, PTuningV2
from lora_jax.methods.prompt import PromptTuning
from lora_jax.pretrained import load_adapter, save_adapter
from lora_jax.pretrained import peft as pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

CLASSES = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, LLAMA),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config, GPT2),
    "llama head": (transformers.LlamaForSequenceClassification, transformers.LlamaConfig, LLAMA),
    "bert": (transformers.BertForSequenceClassification, transformers.BertConfig, BERT),
}
PREFIX = (peft.PrefixTuningConfig, {"num_virtual_tokens": 3})
MLP = (peft.PrefixTuningConfig, {"num_virtual_tokens": 3, "prefix_projection": True,
                                 "encoder_hidden_size": 5})  # fmt: skip
PROMPT = (peft.PromptTuningConfig, {"num_virtual_tokens": 3})
# PEFT and transformers warn of each other's ageing names; that is not what is tested.
pytestmark = pytest.mark.filterwarnings("ignore")


def theirs(model, ahead=0):
    """Logits of the text, without those of the `ahead` rows in front."""
    tokens = torch.tensor(TOKENS, dtype=torch.long)
    mask = torch.ones(TOKENS.shape, dtype=torch.long)
    if getattr(model, "peft_type", None) == "PREFIX_TUNING":
        # PEFT's own way asks transformers' signatures for `past_key_values`; 5.24 renamed it in
        # those of its heads. The keys and values that PEFT stored are handed over here.
        cache, model = model.get_prompt(len(tokens)), model.get_base_model()
        names = inspect.signature(model.forward).parameters
        name = "cache" if "cache" in names else "past_key_values"
        rows = cache.get_seq_length()
        mask = torch.cat([torch.ones(len(tokens), rows, dtype=torch.long), mask], dim=1)
        options = {name: cache}
    else:
        options = {}
    with torch.no_grad():
        out = model(input_ids=tokens, attention_mask=mask, **options).logits
    return out.numpy()[:, ahead:] if out.ndim == 3 else out.numpy()


def ours(model, method, params, trainable):
    return jax.jit(lj.adapt(model.apply))(method.combine(params, trainable), TOKENS)


def close(got, want):
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


CASES = {
    "prefix, llama": ("llama", PREFIX, "CAUSAL_LM"),
    "prefix, gpt2, mlp": ("gpt2", MLP, "CAUSAL_LM"),
    "prefix, llama, head": ("llama head", PREFIX, "SEQ_CLS"),
    "prefix, bert, head": ("bert", PREFIX, "SEQ_CLS"),
    "prompt, llama": ("llama", PROMPT, "CAUSAL_LM"),
}


@pytest.mark.parametrize("case", CASES)
def test_from_peft_and_back(tmp_path, case):
    kind, (cls, options), task = CASES[case]
    base, model, params = fresh(CLASSES[kind], tmp_path / "base")
    adapted = peft.get_peft_model(base, cls(task_type=task, **options)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "theirs")
    ahead = 3 if "prompt" in case else 0
    want = theirs(adapted, ahead)
    assert np.abs(want - theirs(fresh(CLASSES[kind], tmp_path / "base")[0])).max() > 0.01
    if case == "prefix, llama":
        params = partition.split_stacks(params, {"layers": [1]})
    method, trainable = load_adapter(tmp_path / "theirs", model, params)
    assert type(method) is (PromptTuning if ahead else PrefixTuning)
    close(ours(model, method, params, trainable), want)
    save_adapter(tmp_path / "ours", model, method, trainable, params=params)
    again = fresh(CLASSES[kind], tmp_path / "base")[0]
    back = peft.PeftModel.from_pretrained(again, tmp_path / "ours")
    close(theirs(back.eval(), ahead), want)
    names = [
        {n: x.shape for n, x in load_file(tmp_path / who / "adapter_model.safetensors").items()}
        for who in ("theirs", "ours")
    ]
    assert names[0] == names[1]
    again, loaded = load_adapter(tmp_path / "ours", model, params)
    assert again == method
    assert jax.tree.map(np.shape, loaded) == jax.tree.map(np.shape, trainable)


def test_a_part_of_a_fused_module_beside_a_prefix(tmp_path):
    """PEFT saves the module that it is a part of, and we read that again."""
    base, model, params = fresh(CLASSES["gpt2"], tmp_path / "base")
    method = PrefixTuning(length=3, hidden=0, train=("^layers/1/attention/query/",))
    params = method.arrange(params)
    keys = iter(jax.random.split(jax.random.key(1), 99))
    trainable = jax.tree.map(
        lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape),
        method.init(jax.random.key(0), params),
    )
    save_adapter(tmp_path / "ours", model, method, trainable, params=params)
    held = set(load_file(tmp_path / "ours" / "adapter_model.safetensors"))
    assert "base_model.transformer.h.1.attn.c_attn.weight" in held
    assert not any("#" in name for name in held)
    want = ours(model, method, params, trainable)
    back = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    close(theirs(back.eval()), want)
    _, _, plain = fresh(CLASSES["gpt2"], tmp_path / "base")
    arranged = pretrained.arranged(tmp_path / "ours", model, plain)
    again, loaded = load_adapter(tmp_path / "ours", model, arranged)
    assert all("layers/1/attention" in pattern for pattern in again.train)
    close(ours(model, again, arranged, loaded), want)


def test_what_training_alone_needed_is_not_saved(tmp_path):
    _, model, params = fresh(CLASSES["gpt2"], tmp_path / "base")
    method = PrefixTuning(length=2, hidden=4)
    trainable = method.init(jax.random.key(0), params)
    save_adapter(tmp_path / "ours", model, method, trainable)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["peft_type"] == "PREFIX_TUNING" and config["num_virtual_tokens"] == 2
    again, loaded = load_adapter(tmp_path / "ours", model, params)
    assert again == PrefixTuning(length=2, hidden=0)
    close(ours(model, again, params, loaded), ours(model, method, params, trainable))


def test_p_tuning_v2_is_found_again_and_a_prompt_before_an_encoder_is_our_own(tmp_path):
    _, model, params = fresh(CLASSES["bert"], tmp_path / "base")
    for method in (PTuningV2(length=2), PromptTuning(length=2, train=("^head/",))):
        trainable = method.init(jax.random.key(0), params)
        save_adapter(tmp_path / method.name, model, method, trainable, params=params)
        again, loaded = load_adapter(tmp_path / method.name, model, params)
        assert again == method and set(loaded) == set(trainable)
        close(ours(model, again, params, loaded), ours(model, method, params, trainable))
    config = json.loads((tmp_path / "prompt_tuning" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA_JAX"
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}
    (tmp_path / "prompt_tuning" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(lj.UserError, match=r"in place of \[CLS\]"):
        load_adapter(tmp_path / "prompt_tuning", model, params)


def test_files_that_do_not_fit_say_so(tmp_path):
    _, model, params = fresh(CLASSES["gpt2"], tmp_path / "base")
    method = PrefixTuning(length=2, hidden=0)
    save_adapter(tmp_path / "a", model, method, method.init(jax.random.key(0), params))
    _, other, wrong = fresh(CLASSES["llama"], tmp_path / "other")
    with pytest.raises(lj.UserError, match="columns"):
        load_adapter(tmp_path / "a", other, wrong, force=True)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    text = json.dumps({**config, "num_virtual_tokens": 9})
    (tmp_path / "a" / "adapter_config.json").write_text(text)
    with pytest.raises(lj.UserError, match="num_virtual_tokens is 9"):
        load_adapter(tmp_path / "a", model, params)
    text = json.dumps({**config, "some_new_option": 3})
    (tmp_path / "a" / "adapter_config.json").write_text(text)
    with pytest.raises(lj.UserError, match="not implemented here: some_new_option=3"):
        load_adapter(tmp_path / "a", model, params)
    text = json.dumps({**config, "modules_to_save": ["ln_f"]})
    (tmp_path / "a" / "adapter_config.json").write_text(text)
    with pytest.raises(lj.UserError, match="ln_f.weight, of modules_to_save, is not in the file"):
        load_adapter(tmp_path / "a", model, params)
