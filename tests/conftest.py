"""Fake CPU devices and strict JAX settings, set before anything imports jax."""

import gc
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")


def _is_known(flag: str) -> bool:
    """Whether this jaxlib has the flag: one that it has not ends the process that asks for it."""
    asked = {**os.environ, "XLA_FLAGS": f"--{flag}"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(command, env=asked, capture_output=True).returncode == 0


# Compiling takes longer than what is compiled: of a test's small programs nothing is optimised, and
# a fusion gets no pipeline of MLIR passes of its own, which would be three quarters of compiling.
for flag in ("xla_force_host_platform_device_count=4", "xla_backend_optimization_level=0"):
    if flag.partition("=")[0] not in flags:
        flags += f" --{flag}"
emitters = "xla_cpu_use_fusion_emitters"
if emitters not in flags and _is_known(f"{emitters}=false"):
    flags += f" --{emitters}=false"
os.environ["XLA_FLAGS"] = flags.strip()

# The same program is compiled by many tests, in several processes: the first one's is kept.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/lora_jax_tests_xla")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes many small objects and few cycles: to look for those every 700 new ones, the default
# of Python 3.11, took a tenth of all tests' time.
gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="module", autouse=True)
def _programs_are_forgotten() -> Iterator[None]:
    """Before they are too many: a program is mapped in pieces, of which Linux allows a process
    65,530 (vm.max_map_count); so many would take some 15 GB."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of real test data; tests that need it are skipped where it is missing."""
    default = pathlib.Path(__file__).parents[2] / "shared"
    folder = pathlib.Path(os.environ.get("LORA_JAX_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}: set LORA_JAX_TEST_DATA")
    return folder


# Of tiny_base's data. Grain draws the order of so many in a tenth of the time that it takes for 20:
# it draws among 65,536 until it meets one that is there.
ROWS = 204


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> pathlib.Path:
    """A folder with `base/` (a two-layer Llama and its byte tokenizer) and `data.jsonl`, rows
    {"a", "b"}: small enough for whole runs in a test."""
    import json

    import numpy as np
    import tokenizers
    from tokenizers import decoders, pre_tokenizers

    from lora_jax import pretrained

    root = tmp_path_factory.mktemp("tiny")
    hf = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300,
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    model = pretrained.build_model(hf)
    params = model.init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    # Larger than the usual start, so that every module matters to the loss.
    params = jax.tree.map(lambda x: x * 4.0 if x.ndim > 1 else x, params)
    pretrained.save_pretrained(root / "base", model, params)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, "<end>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(root / "base" / "tokenizer.json"))
    (root / "base" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    rows = [json.dumps({"a": f"{i * 7 % 24} and", "b": f"{i * 5 % 24}"}) for i in range(ROWS)]
    (root / "data.jsonl").write_text("\n".join(rows))
    return root


@pytest.fixture(scope="session")
def tiny_config(tiny_base):
    """A function of further entries that gives an (unexpanded) config over `tiny_base`."""

    def config(**sections):
        base = {
            "model": {"source": str(tiny_base / "base")},
            "method": {"kind": "lora", "rank": 2, "alpha": 4.0, "targets": "all-linear"},
            "data": {
                "source": {"kind": "files", "path": str(tiny_base / "data.jsonl"),
                           "split": f"[:{ROWS - 4}]"},
                "task": {"kind": "text_to_text", "prompt_template": "{a}",
                         "completion_template": "{b}"},
                "validation": f"[{ROWS - 4}:]", "batch_size": 2, "length": 32,
            },
            "training": {"steps": 4, "log_every": 1},
            "evaluation": {"max_new_tokens": 3, "show": 1, "batch_size": 4},
        }  # fmt: skip
        for name, entries in sections.items():
            base[name] = {**base.get(name, {}), **entries} if isinstance(entries, dict) else entries
        return base

    return config


@pytest.fixture
def small_configs(tiny_base, tiny_mnist, tmp_path, monkeypatch) -> pathlib.Path:
    """A folder, and the current one, with configs/ on tiny models and the real experiments/."""
    import stand_ins

    stand_ins.write(tmp_path, tiny_base / "base", tiny_mnist)
    (tmp_path / "experiments").symlink_to(stand_ins.CONFIGS.parent / "experiments")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MNIST_DIR", str(tiny_mnist))
    # What configs import from each other is the real ones; and the path is restored afterwards.
    monkeypatch.syspath_prepend(str(stand_ins.CONFIGS))
    return tmp_path


@pytest.fixture
def smoke_on_mnist(tiny_mnist, tmp_path, monkeypatch):
    """smoke_on_mnist("beyond_width") -> the table, filled in tmp_path/"runs" at smoke scale."""
    from lora_jax import tables

    monkeypatch.setenv("MNIST_DIR", str(tiny_mnist))

    def run(name: str):
        file = pathlib.Path(__file__).parents[1] / "experiments" / f"{name}.py"
        table = tables.load(str(file), "smoke")
        return tables.run(table, "smoke", tmp_path / "runs", progress=False)

    return run


@pytest.fixture(scope="session")
def tiny_mnist(tmp_path_factory) -> pathlib.Path:
    """A folder of TFDS's with an `mnist` of 120 and 40 images, a bright block where the class is:
    a network learns it in few updates."""
    import gzip
    import hashlib
    import struct

    import numpy as np

    from lora_jax.data import mnist

    mirror, root = tmp_path_factory.mktemp("mirror"), tmp_path_factory.mktemp("tfds")
    rng = np.random.default_rng(0)
    sums = {}

    def write(name: str, array: np.ndarray) -> None:
        header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        content = gzip.compress(header + array.tobytes())
        (mirror / name).write_bytes(content)
        sums[name] = hashlib.sha256(content).hexdigest()

    for prefix, count in (("train", 120), ("t10k", 40)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = rng.integers(0, 60, (count, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            row, column = divmod(int(label), 5)
            image[12 * row : 12 * row + 10, 5 * column : 5 * column + 5] += 150
        write(f"{prefix}-images-idx3-ubyte.gz", images)
        write(f"{prefix}-labels-idx1-ubyte.gz", labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist, "MIRROR", mirror.as_uri())
        patch.setattr(mnist, "FILES", sums)
        mnist.Mnist(data_dir=str(root)).download_and_prepare(file_format="array_record")
    return root


@pytest.fixture(scope="session")
def tiny_images(tiny_mnist):
    """A function of further entries that gives an (unexpanded) config over `tiny_mnist`."""

    def config(**sections):
        base = {
            "model": {"shape": {"model_type": "mlp", "widths": (6,)}, "init_seed": 0},
            "method": {"kind": "subspace", "dimension": 30},
            "data": {
                "source": {"kind": "tfds", "name": "mnist", "data_dir": str(tiny_mnist)},
                "task": {"kind": "image_classification"},
                "validation": "test", "batch_size": 20, "length": 1, "packing": False,
            },
            "optimizer": {"name": "adam", "learning_rate": 0.3, "schedule": "constant"},
            "training": {"steps": 12, "eval_every": 4, "log_every": 4, "keep": "best"},
            "evaluation": {"batch_size": 16},
        }  # fmt: skip
        for name, entries in sections.items():
            base[name] = {**base.get(name, {}), **entries}
        return base

    return config
