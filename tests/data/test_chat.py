"""Chat templates, against transformers' own renderer."""

from __future__ import annotations

import pytest

from lora_jax.data import chat
from lora_jax.errors import UserError

TRICKY = """{% for message in messages %}
    {% if message.role == 'skip' %}
        {% continue %}
    {% endif %}
<{{ message.role }}>{{ message.content | tojson }}
{% endfor %}
{% if add_generation_prompt %}
<assistant>{% endif %}"""


def test_same_text_as_transformers() -> None:
    # trim_blocks and lstrip_blocks, tojson without HTML escapes, loop controls.
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [
        {"role": "user", "content": {"q": "<é> & 'b'"}},
        {"role": "skip", "content": "x"},
        {"role": "assistant", "content": "ok"},
    ]
    for opening in (False, True):
        theirs, _ = utils.render_jinja_template(
            [messages], chat_template=TRICKY, add_generation_prompt=opening
        )
        assert chat.render(TRICKY, messages, add_generation_prompt=opening) == theirs[0]


def test_smollm_template(smollm) -> None:  # type: ignore[no-untyped-def]
    text = chat.render(
        smollm.chat_template, [{"role": "user", "content": "Hi"}], add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_raise_exception_and_syntax_are_user_errors() -> None:
    with pytest.raises(UserError, match="roles must alternate"):
        chat.render("{{ raise_exception('roles must alternate') }}", [])
    with pytest.raises(UserError, match="chat template"):
        chat.render("{% if %}", [])


def test_sandboxed() -> None:
    with pytest.raises(UserError):
        chat.render("{{ messages.append(1) }}", [{"role": "user", "content": ""}])
    with pytest.raises(UserError):
        chat.render("{{ ''.__class__.__mro__ }}", [])
