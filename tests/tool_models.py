"""Small models with the tokens of tool calls: a test's checkpoint whose reserved tokens are called so."""

from __future__ import annotations

import shutil
from pathlib import Path

from lfm2vl_convert import convert_checkpoint

TOKENS = tuple(f"<|tool_{what}_{end}|>" for what in ("list", "call", "response") for end in ("start", "end"))
TEMPLATE = """
{{- bos_token }}
{%- if tools -%}
<|im_start|>system
List of tools: <|tool_list_start|>{{ tools | tojson }}<|tool_list_end|><|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% set content = message.content if message.content is string else message.content | map(attribute='text') | join -%}
{{ '<|tool_response_start|>' + content + '<|tool_response_end|>' if message.role == 'tool' else content }}<|im_end|>
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def convert_with_tools(checkpoint: Path, folder: Path) -> Path:
    """Convert a checkpoint whose tokens `<|reserved_8|>` to `<|reserved_13|>` are those of `TOKENS`."""
    copy = folder / "checkpoint"
    shutil.copytree(checkpoint, copy)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (copy / name).read_text(encoding="utf-8")
        for number, token in enumerate(TOKENS, 8):
            text = text.replace(f"<|reserved_{number}|>", token)
        (copy / name).write_text(text, encoding="utf-8")
    (copy / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    convert_checkpoint(copy, folder / "model", quant="F32", mmproj_quant="F32")
    return folder / "model"
