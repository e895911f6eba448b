"""Chat templates, rendered as transformers renders them."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lora_jax.errors import UserError


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """The text of a conversation.

    Args:
      template: jinja2 source, as in tokenizer_config.json.
      messages: [{"role": "user" | "assistant" | "system" | …, "content": str}, …].
      add_generation_prompt: end with the opening of an assistant turn.
      **variables: further names the template may read (bos_token, eos_token, tools, …).

    Raises:
      UserError: the template is malformed, or refuses the messages (`raise_exception`).
    """
    try:
        return _compiled(template).render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, **variables
        )
    except jinja2.TemplateError as error:
        raise UserError(f"The chat template cannot render these messages: {error}") from error


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any
) -> str:
    # jinja2's own `tojson` escapes <, > and & for HTML, which a language model should not see.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)
