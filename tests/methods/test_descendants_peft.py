"""PEFT's own implementations beside ours: logits, gradients, and files both ways."""

from __future__ import annotations

import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax import partition
from lora_jax.methods import METHODS as ALL
from lora_jax.pretrained import build_model, load_adapter, save_adapter, save_pretrained
from lora_jax.pretrained.assemble import abstract_params
from lora_jax.pretrained.load import family_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TINY = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "attention_bias": True,
}  # fmt: skip
TOKENS = np.arange(14, dtype=np.int32).reshape(2, 7) * 5 % 32
SOME = (r"attention/query$", r"layers/1/mlp/down$")
CASES = {
    "dora": ALL["dora"](rank=((r"query", 3), (".*", 2)), alpha=4.0, targets=SOME),
    "dora, whole": ALL["dora"](rank=2, train=(r"^head/kernel$",)),
    "vera": ALL["vera"](rank=5, targets=SOME, d_initial=0.3),
    "ia3": ALL["ia3"](targets=(r"attention/(key|value)$", r"mlp/down$")),
    "loha": ALL["loha"](rank=((r"layers/0/", 3), (".*", 2)), alpha=5.0, targets=SOME),
    "lokr": ALL["lokr"](rank=1, alpha=2.0, targets=SOME),
    "lokr, both": ALL["lokr"](rank=1, alpha=2.0, decompose_both=True, decompose_factor=4),
    "lokr, full": ALL["lokr"](rank=9, alpha=2.0, targets=SOME),
    "adalora": ALL["adalora"](rank=3, alpha=4.0, total_steps=9, target_rank=2, targets=SOME),
    "lora_plus": ALL["lora_plus"](rank=3, lr_ratio=7.0, targets=SOME),
    "lora_fa": ALL["lora_fa"](rank=3, targets=SOME),
    "pissa": ALL["pissa"](rank=((r"query", 3), (".*", 2)), alpha=4.0, targets=SOME),
    "olora": ALL["olora"](rank=3, targets=SOME, scaling="rslora"),
    "eva": ALL["eva"](rank=3, targets=SOME),
}
# Those whose file holds just what is trained; the others' has more, or something else.
LINEAR = [n for n in CASES if n.split(",")[0] in ("dora", "ia3", "loha", "lokr", "adalora")]


@pytest.fixture(autouse=True)
def libraries_may_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@functools.cache
def ours():
    model = build_model(TINY)
    like = abstract_params(family_of(model).tensors(model.config))
    rng = np.random.default_rng(0)
    flat = {
        p: jnp.asarray(0.2 * rng.standard_normal(x.shape) + p.endswith("scale"), jnp.float32)
        for p, x in partition.flatten(like).items()
    }
    return model, partition.unflatten_like(like, flat)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    save_pretrained(path, *ours())
    return path


def hugging_face(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def moved(trainable, seed=1, size=0.2):
    """Noise on every entry that is not padding, which is zero in all layers' rows."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + jnp.asarray(size * rng.standard_normal(x.shape), x.dtype), trainable
    )


def unpadded(method, params, trainable):
    """With zeros again where layers have smaller ranks or none."""
    live = jax.tree.map(lambda x: (x != 0).astype(x.dtype), _full(method, params))
    return jax.tree.map(jnp.multiply, trainable, live)


def _full(method, params):
    """A tree with something in every entry that counts: the start moved, and written and read."""
    ranks = method.ranks(params) if hasattr(method, "ranks") else {}
    tree = jax.tree.map(jnp.ones_like, method.init(jax.random.key(0), params))
    for path, layers in ranks.items():
        for name, x in tree[path].items():
            axis = {"a": -1, "a1": -1, "a2": -1, "d": -1, "e": -1, "b": -2, "b1": -2, "b2": -2}
            keep = np.ones(x.shape, np.float32)
            for layer, r in enumerate(layers):
                along = axis.get(name)
                if r == 0:
                    keep[layer] = 0
                elif along is not None and method.name != "vera":
                    keep[layer] *= (
                        (np.arange(x.shape[along]) < r)
                        if along == -1
                        else (np.arange(x.shape[along]) < r)[:, None]
                    )
            tree[path] = {**tree[path], name: jnp.asarray(keep)}
    return tree


def trained(name):
    method, (_, params) = CASES[name], ours()
    return unpadded(method, params, moved(method.init(jax.random.key(0), params)))


@jax.jit
def _logits(variables):
    return lj.adapt(ours()[0].apply)(variables, TOKENS)


def weights():
    return np.random.default_rng(3).standard_normal((2, 7, 32)).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_to_peft(tmp_path, folder, name):
    """What we write, PEFT computes alike: logits, and derivatives with respect to its tensors."""
    method, (model, params), trainable = CASES[name], ours(), trained(name)
    save_adapter(tmp_path / "a", model, method, trainable, params=params, base_name=str(folder))
    theirs = peft.PeftModel.from_pretrained(
        hugging_face(folder), tmp_path / "a", is_trainable=True
    ).eval()
    out = theirs(torch.tensor(TOKENS, dtype=torch.long)).logits
    want = out.detach().numpy()

    numbers = method.numbers(params)

    @jax.jit
    def both(trainable):
        def total(t):
            y = lj.adapt(model.apply)(method.combine(params, t, numbers=numbers), TOKENS)
            return jnp.sum(y * weights()), y

        return jax.value_and_grad(total, has_aux=True)(trainable)

    (_, got), gradient = both(trainable)
    base = _logits({"params": params})
    assert np.abs(want - base).max() > 0.01
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    if name not in LINEAR and not name.startswith("vera"):
        return
    (out * torch.tensor(weights())).sum().backward()
    save_adapter(tmp_path / "g", model, method, gradient, params=params)
    written = load_file(tmp_path / "g" / "adapter_model.safetensors")
    compared = 0
    for tensor, parameter in theirs.named_parameters():
        key = tensor.replace(".default", "").replace(".modules_to_save.", ".")
        key = key if key in written else key.removesuffix(".weight")
        if parameter.grad is None or key not in written:
            continue
        scale = max(1.0, float(parameter.grad.abs().max()))
        np.testing.assert_allclose(written[key], parameter.grad.numpy(), atol=1e-5 * scale)
        compared += 1
    assert compared == sum("vera_A" not in k and "vera_B" not in k for k in written)


@pytest.mark.parametrize("name", CASES)
def test_round_trip(tmp_path, name):
    """The file gives back the method and its tree, exactly; without our header, the function."""
    method, (model, params), trainable = CASES[name], ours(), trained(name)
    save_adapter(tmp_path / "a", model, method, trainable, params=params)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["peft_type"] != "LORA_JAX"
    again, loaded = load_adapter(tmp_path / "a", model, params)
    assert again == method and type(again) is type(method)
    jax.tree.map(np.testing.assert_array_equal, loaded, trainable)
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file(load_file(file), file)  # as PEFT would have written it
    told, loaded = load_adapter(tmp_path / "a", model, params)
    want = _logits(method.combine(params, trainable))
    got = _logits(told.combine(params, loaded))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    lora = ("lora_plus", "lora_fa", "pissa", "olora", "eva")
    assert told.name == ("lora" if name in lora else method.name)


PEFT_CONFIGS = {
    "dora": (peft.LoraConfig, {"target_modules": ["q_proj", "down_proj"], "r": 3,
                               "lora_alpha": 7, "use_dora": True, "use_rslora": True,
                               "rank_pattern": {"down_proj": 2}}),
    "vera": (peft.VeraConfig, {"target_modules": ["q_proj", "down_proj"], "r": 4}),
    "ia3": (peft.IA3Config, {"target_modules": ["k_proj", "v_proj", "down_proj"],
                             "feedforward_modules": ["down_proj"]}),
    "loha": (peft.LoHaConfig, {"target_modules": ["q_proj", "up_proj"], "r": 2, "alpha": 5,
                               "rank_pattern": {"up_proj": 3}}),
    "lokr": (peft.LoKrConfig, {"target_modules": ["q_proj", "up_proj"], "r": 1, "alpha": 5}),
    "lokr, whole": (peft.LoKrConfig, {"target_modules": ["q_proj"], "r": 1, "alpha": 5,
                                      "modules_to_save": ["lm_head"], "decompose_factor": 2}),
    "adalora": (peft.AdaLoraConfig, {"target_modules": ["q_proj", "up_proj"], "init_r": 3,
                                     "target_r": 2, "total_step": 9, "lora_alpha": 5}),
    "dora, embedding": (peft.LoraConfig, {"target_modules": ["q_proj", "embed_tokens"], "r": 3,
                                          "use_dora": True}),
    "adalora, pruned": (peft.AdaLoraConfig, {"target_modules": ["q_proj"], "init_r": 3,
                                             "target_r": 2, "total_step": 9}),
}  # fmt: skip


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_from_peft(tmp_path, folder, name):
    """What PEFT writes, we compute alike, merged or not."""
    (model, params), (config, options) = ours(), PEFT_CONFIGS[name]
    theirs = peft.get_peft_model(hugging_face(folder), config(**options)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
        if name.endswith("pruned"):
            pattern = {}
            for tensor, parameter in theirs.named_parameters():
                if "lora_E" in tensor:
                    parameter[1] = 0
                    pattern[tensor.removeprefix("base_model.model.")] = [True, False, True]
            theirs.peft_config["default"].rank_pattern = pattern
        want = theirs(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    theirs.save_pretrained(tmp_path / "theirs")
    method, trainable = load_adapter(tmp_path / "theirs", model, params)
    assert method.name == name.split(",")[0]
    close = functools.partial(np.testing.assert_allclose, atol=1e-5 * np.abs(want).max())
    close(_logits(method.combine(params, trainable)), want)
    close(_logits({"params": method.merge(params, trainable)}), want)
    if name == "dora, embedding":
        save_adapter(tmp_path / "ours", model, method, trainable, params=params)
        back = peft.PeftModel.from_pretrained(hugging_face(folder), tmp_path / "ours").eval()
        close(back(torch.tensor(TOKENS, dtype=torch.long)).logits.detach().numpy(), want)


def test_what_peft_does_not_have(tmp_path):
    model, params = ours()
    for method in (ALL["loha"](rank=2, dropout=0.1), ALL["vera"](rank=2, train=(r"query/bias$",))):
        trainable = moved(method.init(jax.random.key(0), params))
        with pytest.warns(UserWarning, match="in lora_jax's own form"):
            save_adapter(tmp_path / "a", model, method, trainable, params=params)
        assert load_adapter(tmp_path / "a", model, params)[0] == method


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("loha", {"module_dropout": 0.1}, "module_dropout=0.1"),
        ("ia3", {"target_modules": ["k_proj"]}, "is not in target_modules, and in the file"),
        ("vera", {"some_new_option": 3}, "some_new_option=3"),
        ("ia3", {"modules_to_save": ["lm_head"]}, "lm_head.weight, of modules_to_save, is not in"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, name, change, match):
    method, (model, params), trainable = CASES[name], ours(), trained(name)
    save_adapter(tmp_path / "a", model, method, trainable, params=params)
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(lj.UserError, match=match):
        load_adapter(tmp_path / "a", model, params)
