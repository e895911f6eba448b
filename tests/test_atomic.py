"""A file is there whole or not at all."""

from pathlib import Path
from typing import Any

import pytest

from lora_jax import atomic


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "result.json"
    atomic.write_json(path, {"ä": 1})
    assert path.read_text(encoding="utf-8") == '{\n  "\\u00e4": 1\n}\n'
    write = Path.write_text

    def full(self: Path, text: str, **options: Any) -> int:
        write(self, text[:1], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_text(path, "other")
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert "u00e4" in path.read_text(encoding="utf-8")
