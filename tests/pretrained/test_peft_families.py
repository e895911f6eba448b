"""Adapters of other families and heads, both ways between PEFT and here."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from peft_models import BERT, GPT2, LLAMA, TOKENS, fresh
from safetensors.numpy import load_file
from test_peft import same, trained, without_header

import lora_jax as lj
from lora_jax import partition
from lora_jax.methods import METHODS
from lora_jax.pretrained import load_adapter, save_adapter

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

CLASSES = {
    "bert": (transformers.BertForSequenceClassification, transformers.BertConfig, BERT),
    "roberta": (transformers.RobertaForSequenceClassification, transformers.RobertaConfig, BERT),
    "llama": (transformers.LlamaForSequenceClassification, transformers.LlamaConfig, LLAMA),
    "gpt2 lm": (transformers.GPT2LMHeadModel, transformers.GPT2Config, GPT2),
    "gpt2": (transformers.GPT2ForSequenceClassification, transformers.GPT2Config, GPT2),
    "bert bare": (transformers.BertModel, transformers.BertConfig, BERT),
}  # fmt: skip
# PEFT and transformers warn of each other's ageing names; that is not what is tested.
pytestmark = pytest.mark.filterwarnings("ignore")


def theirs(model):
    with torch.no_grad():
        out = model(torch.tensor(TOKENS, dtype=torch.long))
    return (out.logits if "logits" in out else out.last_hidden_state).numpy()


def ours(model, method, params, trainable):
    return jax.jit(lj.adapt(model.apply))(method.combine(params, trainable), TOKENS)


def moved_and_saved(adapted, folder):
    """Outputs of PEFT's model once its trained parameters have moved, as it is saved."""
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return theirs(adapted)


def close(got, want):
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


FROM = {
    "bert": ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bert all-linear": ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "bert, all biases": ("bert", {
        "target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "bert, no task": ("bert", {"target_modules": "all-linear"}),
    "roberta": ("roberta", {
        "target_modules": ["key", "dense"], "task_type": "SEQ_CLS",
        "modules_to_save": ["classifier"]}),
    "llama": ("llama", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "llama, no task": ("llama", {"target_modules": "all-linear"}),
    "gpt2 lm": ("gpt2 lm", {"target_modules": ["c_attn", "c_proj"], "task_type": "CAUSAL_LM"}),
    "gpt2 lm, biases": ("gpt2 lm", {
        "target_modules": ["c_attn"], "bias": "lora_only", "rank_pattern": {"0.attn.c_attn": 5}}),
    "gpt2 lm, attention whole": ("gpt2 lm", {
        "target_modules": ["c_fc"], "modules_to_save": ["1.attn.c_attn"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn"], "task_type": "SEQ_CLS"}),
    "bert bare": ("bert bare", {
        "target_modules": ["query"], "task_type": "FEATURE_EXTRACTION"}),
}  # fmt: skip


@pytest.mark.parametrize("case", FROM)
def test_from_peft_and_back(tmp_path, case):
    kind, options = FROM[case]
    base, model, params = fresh(CLASSES[kind], tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=6, **options))
    want = moved_and_saved(adapted, tmp_path / "theirs")
    if "whole" in case:
        params = partition.split_stacks(params, {"layers": [1]})
    method, trainable = load_adapter(tmp_path / "theirs", model, params)
    close(ours(model, method, params, trainable), want)
    save_adapter(tmp_path / "ours", model, method, trainable, params=params)
    again = fresh(CLASSES[kind], tmp_path / "base")[0]
    back = peft.PeftModel.from_pretrained(again, tmp_path / "ours")
    close(theirs(back), want)
    # What we write are PEFT's own names and shapes.
    names = [
        {n: x.shape for n, x in load_file(tmp_path / who / "adapter_model.safetensors").items()}
        for who in ("theirs", "ours")
    ]
    assert names[1] == {n: x for n, x in names[0].items() if ".modules_to_save." not in n
                        and ".original_module." not in n}  # fmt: skip
    again, loaded = load_adapter(tmp_path / "ours", model, params)
    assert again == method
    same(loaded, trainable)


FUSED = {
    "ia3": (peft.IA3Config, {"target_modules": ["c_attn", "mlp.c_proj"],
                             "feedforward_modules": ["mlp.c_proj"]}),
    "adalora": (peft.AdaLoraConfig, {"target_modules": ["c_attn"], "init_r": 3, "target_r": 2,
                                     "total_step": 9}),
    "vera": (peft.VeraConfig, {"target_modules": ["c_attn"], "r": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_fused_modules_of_other_methods(tmp_path, name):
    """Their shares are split exactly where the method allows it, and refused elsewhere."""
    cls, options = FUSED[name]
    base, model, params = fresh(CLASSES["gpt2 lm"], tmp_path / "base")
    adapted = peft.get_peft_model(base, cls(**options)).eval()
    want = moved_and_saved(adapted, tmp_path / "theirs")
    if name == "vera":
        with pytest.raises(lj.UserError, match="c_attn.vera_lambda_b: the module is 3 here"):
            load_adapter(tmp_path / "theirs", model, params)
        return
    method, trainable = load_adapter(tmp_path / "theirs", model, params)
    close(ours(model, method, params, trainable), want)
    if name == "ia3":  # and back, the query's gain being one
        method, trainable = METHODS["ia3"](), {}
        for i, (path, x) in enumerate(method.init(jax.random.key(0), params).items()):
            slope = 0.01 * (i + 1) * np.arange(x["l"].shape[-1], dtype=np.float32)
            trainable[path] = {"l": x["l"] + slope[None]}
        save_adapter(tmp_path / "ours", model, method, trainable, params=params)
        want = ours(model, method, params, trainable)
        back = peft.PeftModel.from_pretrained(base.from_pretrained(tmp_path / "base"),
                                              tmp_path / "ours").eval()  # fmt: skip
        close(theirs(back), want)
        again, loaded = load_adapter(tmp_path / "ours", model, params)
        assert again == method
        same(loaded, trainable)
        without_header(tmp_path / "ours")
        again, loaded = load_adapter(tmp_path / "ours", model, params)
        close(ours(model, again, params, loaded), want)


HEAD = r"^head/"
TO = {
    "bert, head": ("bert", lj.LoRA(rank=2, train=(HEAD,)), "SEQ_CLS"),
    "bert, half the head": ("bert", lj.LoRA(rank=2, train=(r"^head/out/kernel",)), "SEQ_CLS"),
    "bert, frozen head": ("bert", lj.LoRA(rank=2), None),
    "bert, adapted head": ("bert", lj.LoRA(rank=2, targets="^head/out$"), None),
    "roberta, head": ("roberta", lj.LoRA(rank=2, train=(HEAD,)), "SEQ_CLS"),
    "roberta, half the head": ("roberta", lj.LoRA(rank=2, train=(r"^head/out",)), "SEQ_CLS"),
    "llama, head": ("llama", lj.LoRA(rank=2, train=(HEAD,)), "SEQ_CLS"),
    "gpt2, query and value": ("gpt2 lm", lj.LoRA(rank=2, alpha=6), "CAUSAL_LM"),
    "gpt2, unequal": ("gpt2 lm", lj.LoRA(
        rank=(("query", 3), ("layers/0/.*key", 1), (".*", 2)),
        alpha=(("query", 3), ("layers/0/.*key", 1), (".*", 2)),
        targets=(r"attention/(query|key)$", r"mlp/up$")), "CAUSAL_LM"),
    "gpt2, rslora": ("gpt2 lm", lj.LoRA(
        rank=2, targets=r"attention/(query|key|value|out)$", scaling="rslora"), "CAUSAL_LM"),
    "gpt2, scales apart": ("gpt2 lm", lj.LoRA(
        rank=2, alpha=(("query", 3), (".*", 7))), "CAUSAL_LM"),
    "bert bare": ("bert bare", lj.LoRA(rank=2), "FEATURE_EXTRACTION"),
}  # fmt: skip


@pytest.mark.parametrize("case", TO)
def test_to_peft(tmp_path, case):
    kind, method, task = TO[case]
    base, model, params = fresh(CLASSES[kind], tmp_path / "base")
    trainable = jax.tree.map(lambda x: 0.3 * x, trained(method, params))
    save_adapter(tmp_path / "ours", model, method, trainable, params=params)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["task_type"] == task
    want = ours(model, method, params, trainable)
    close(theirs(peft.PeftModel.from_pretrained(base, tmp_path / "ours")), want)
    again, loaded = load_adapter(tmp_path / "ours", model, params)
    if "half" not in case and "scales apart" not in case:
        assert again == method and set(loaded) == set(trainable)
        same({path: loaded[path] for path in trainable}, trainable)
    close(ours(model, again, params, loaded), want)
    without_header(tmp_path / "ours")
    again, loaded = load_adapter(tmp_path / "ours", model, params)
    close(ours(model, again, params, loaded), want)
