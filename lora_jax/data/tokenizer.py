"""Tokenizer: one small face over the `tokenizers` library, from a Hugging Face folder or a GGUF."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from lora_jax.errors import UserError

# llama.cpp's numbers in `tokenizer.ggml.token_type`.
_CONTROL, _USER_DEFINED = 3, 4
# Special tokens as named by tokenizer_config.json.
_ROLES = (
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "cls_token",
    "sep_token",
    "mask_token",
)


class Tokenizer:
    """Text to token ids and back.

    Attributes:
      backend: the `tokenizers.Tokenizer` that does the work.
      eos_id, bos_id: ids, or None where the tokenizer has no such token.
      pad_id: id that fills padding; the end token, else 0, where no padding token is named
        (padding never counts: batches carry segment_ids).
      add_bos: whether a text of this model starts with bos_id.
      chat_template: jinja2 source, or None.
      special_tokens: role -> text, e.g. {"eos_token": "<|im_end|>"}; chat templates read these.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: dict[str, str] | None = None,
        chat_template: str | None = None,
        add_bos: bool = False,
    ) -> None:
        # A saved tokenizer.json may cut and pad on its own; here lengths are the loader's business.
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens = dict(special_tokens or {})
        self.backend = backend
        self._give_template()
        self.chat_template = chat_template
        self.eos_id = self._role_id("eos_token")
        self.bos_id = self._role_id("bos_token")
        pad_id = self._role_id("pad_token")
        self.pad_id: int = pad_id if pad_id is not None else (self.eos_id or 0)
        self.add_bos = add_bos and self.bos_id is not None

    def _role_id(self, role: str) -> int | None:
        text = self.special_tokens.get(role)
        if text is None:
            return None
        index = self.backend.token_to_id(text)
        if index is None:
            raise UserError(
                f"{role} is {text!r}, which is not in the vocabulary of this tokenizer."
            )
        return int(index)

    def _give_template(self) -> None:
        """BERT's template, where cls and sep tokens are named and no template uses them."""
        cls, sep = (self.special_tokens.get(role) for role in ("cls_token", "sep_token"))
        if not (cls and sep) or self.backend.num_special_tokens_to_add(is_pair=True):
            return
        self.backend.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(t, self.backend.token_to_id(t)) for t in (cls, sep)],
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of `text`. Special tokens written in the text become their one id.

        add_special_tokens: also add what the tokenizer's own template adds ([CLS] … [SEP], <s>).
        """
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        found = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def encode_for_classification(
        self, texts: Sequence[str] | Sequence[tuple[str, str]], *, max_length: int
    ) -> list[tuple[list[int], list[int]]]:
        """(ids, token type ids) of texts, or of pairs, with the model's special tokens.

        The special tokens are those of the tokenizer's own template: [CLS] a [SEP] b [SEP] for
        BERT, <s> a </s></s> b </s> for RoBERTa. One that has none but names cls and sep tokens is
        given BERT's; one that names neither (a decoder's) gets bos where it wants one, a, b.

        max_length: tokens, special ones included. The longer of the two texts is cut first.
        """
        pair = bool(texts) and not isinstance(texts[0], str)
        special = self.backend.num_special_tokens_to_add(is_pair=pair)
        if max_length <= special:
            raise UserError(
                f"max_length={max_length} has no room for text: the special tokens are {special}."
            )
        self.backend.enable_truncation(max_length, strategy="longest_first")
        try:
            found = self.backend.encode_batch(list(texts), add_special_tokens=True)
        finally:  # everywhere else lengths are the loader's business
            self.backend.no_truncation()
        return [(encoding.ids, encoding.type_ids) for encoding in found]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Text of `ids`; the inverse of `encode` for byte-level tokenizers."""
        plain = [int(i) for i in ids]
        return str(self.backend.decode(plain, skip_special_tokens=skip_special_tokens))

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """From a Hugging Face folder: tokenizer.json (or GPT-2's vocab.json and merges.txt), with
        tokenizer_config.json, special_tokens_map.json and chat_template.jinja where they exist."""
        folder = Path(path)
        config = _read_json(folder / "special_tokens_map.json")
        config |= _read_json(folder / "tokenizer_config.json")
        special = {role: _token_text(config[role]) for role in _ROLES if config.get(role)}
        if (folder / "tokenizer.json").is_file():
            backend = _from_file(folder / "tokenizer.json")
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            backend = _from_gpt2_files(folder)
            if not special and backend.token_to_id("<|endoftext|>") is not None:
                special = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
        else:
            raise UserError(
                f"No tokenizer in {folder}: it needs tokenizer.json, or vocab.json and merges.txt."
            )
        backend.add_special_tokens(
            [
                tokenizers.AddedToken(t, special=True, normalized=False)
                for t in special.values()
                if backend.token_to_id(t) is not None
            ]
        )
        self = cls(backend, special_tokens=special, chat_template=_folder_template(folder, config))
        # Whether the text starts with bos is in the post-processor; asking it is the sure way.
        start = self.encode("", add_special_tokens=True)[:1]
        self.add_bos = self.bos_id is not None and start == [self.bos_id]
        return self

    @classmethod
    def from_gguf(cls, path: str | Path, *, reader: Any = None) -> Tokenizer:
        """From a GGUF file's metadata; byte-level BPE (`tokenizer.ggml.model` "gpt2") only.

        reader: an open `gguf.GGUFReader` of the same file, to save a second parse of it.
        """
        if not Path(path).is_file():
            raise UserError(f"No GGUF file at {path}.")
        if reader is None:
            from gguf import GGUFReader

            reader = GGUFReader(str(path))

        def value(key: str, default: Any = None) -> Any:
            field = reader.get_field(f"tokenizer.{key}")
            return default if field is None else field.contents()

        kind, pre = value("ggml.model"), value("ggml.pre", "gpt-2")
        if kind != "gpt2":
            raise UserError(
                f"{path} holds a tokenizer of kind {kind!r}; from a GGUF only 'gpt2' (byte-level"
                " BPE) can be read. Use the model's Hugging Face folder instead."
            )
        tokens: list[str] = value("ggml.tokens")
        backend = _byte_level_bpe(tokens, value("ggml.merges"), _pre_tokenizer(pre))
        added = {
            special: [
                tokenizers.AddedToken(t, special=special, normalized=False)
                for t, number in zip(tokens, value("ggml.token_type", []), strict=False)
                if number == (_CONTROL if special else _USER_DEFINED)
            ]
            for special in (True, False)
        }
        backend.add_special_tokens(added[True])
        backend.add_tokens(added[False])
        keys = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
        ids = {role: value(f"ggml.{key}_token_id") for key, role in keys.items()}
        return cls(
            backend,
            special_tokens={f"{k}_token": tokens[int(i)] for k, i in ids.items() if i is not None},
            chat_template=value("chat_template"),
            add_bos=bool(value("ggml.add_bos_token", False)),
        )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def _token_text(entry: str | dict[str, Any]) -> str:
    return entry if isinstance(entry, str) else str(entry["content"])


def _folder_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja wins over tokenizer_config.json, as in transformers."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _from_file(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower one
        raise UserError(f"{path} is not a whole tokenizer file: {error}") from None


def _from_gpt2_files(folder: Path) -> tokenizers.Tokenizer:
    vocabulary = _read_json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return _byte_level_bpe(tokens, merges, _pre_tokenizer("gpt-2"))


def _byte_level_bpe(
    tokens: Sequence[str], merges: Sequence[str], pre_tokenizer: pre_tokenizers.PreTokenizer
) -> tokenizers.Tokenizer:
    # A byte-level token never holds a raw space, so the first space splits a merge.
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    return backend


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut before merging, under the name llama.cpp gives it."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    known = {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level]
        ),
    }
    if name not in known:
        raise UserError(
            f"The GGUF asks for pre-tokenizer {name!r}; known here: {', '.join(known)}. A wrong one"
            " gives wrong ids, so load the tokenizer from the model's Hugging Face folder."
        )
    return known[name]
