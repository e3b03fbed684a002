"""Provides the chat template that a recipe chooses, either by name or as a user's own file.

The named templates consist of ordinary text and the tokenizer's own begin and end tokens, so they work with every
tokenizer and without new embedding rows. Every answer ends with the end token, at which the engine stops.
"""

from pathlib import Path

from svc.errors import BaseModelError
from trainer.data.chat_template import read_tokenizer
from trainer.recipe.named_template import NamedTemplate

_REJECT_TOOLS = """\
{%- if tools -%}{{ raise_exception('this chat template has no form for tools') }}{%- endif -%}
{%- for message in messages if message.tool_calls or message.role not in ('system', 'user', 'assistant') -%}
    {{ raise_exception('this chat template has no form for tools and for the role ' + message.role) }}
{%- endfor -%}
"""
_TURNS = {
    NamedTemplate.CHATML: """\
{{- bos -}}
{%- for message in messages -%}
    {{ '<|im_start|>' + message.role + '\\n' + message.content + eos_token + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
""",
    NamedTemplate.TEXT: """\
{{- bos or eos_token -}}
{%- for message in messages -%}
    {{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}
{%- endfor -%}
""",
    NamedTemplate.ALPACA: """\
{{- bos -}}
{%- if messages[0].role != 'system' -%}
    {{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request.' }}
    {{- '\\n\\n' }}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {{ message.content + '\\n\\n' }}
    {%- elif message.role == 'user' -%}
        {{ '### Instruction:\\n' + message.content + '\\n\\n' }}
    {%- else -%}
        {{ '### Response:\\n' + message.content + eos_token + '\\n\\n' }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}
""",
    NamedTemplate.LLAMA_2: """\
{%- set turn = namespace(system='') -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- if not loop.first -%}{{ raise_exception('llama-2 has a system turn only at the start') }}{%- endif -%}
        {%- set turn.system = '<<SYS>>\\n' + message.content + '\\n<</SYS>>\\n\\n' -%}
    {%- elif message.role == 'user' -%}
        {{ bos + '[INST] ' + (turn.system + message.content) | trim + ' [/INST]' }}
        {%- set turn.system = '' -%}
    {%- else -%}
        {{ ' ' + message.content | trim + ' ' + eos_token }}
    {%- endif -%}
{%- endfor -%}
""",
    NamedTemplate.ZEPHYR: """\
{{- bos -}}
{%- for message in messages -%}
    {{ '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}
""",
}


def template_text(chosen: NamedTemplate | Path, folder: Path) -> str:
    """Return the text of the chat template that a recipe chooses.

    Args:
        chosen: a name, or the path of a file.
        folder: folder of the base model. If the base's tokenizer puts the begin token before every text, a named
            template also starts with this token, because the base was trained with it.

    Raises:
        BaseModelError: the file cannot be read, or the base's tokenizer has no end token.
    """
    if isinstance(chosen, Path):
        try:
            return chosen.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise BaseModelError(
                f"cannot read the chat template {chosen}: {error}",
                expected="a Jinja template in UTF-8",
                todo="correct `chat_template` in the recipe; its path is relative to the recipe",
            ) from error
    tokenizer = read_tokenizer(folder)
    if tokenizer.eos_token is None:
        raise BaseModelError(
            f"the tokenizer in {folder} has no end token, but the chat template {chosen} ends each answer with one",
            expected="eos_token in tokenizer_config.json",
            todo=f"set eos_token in {folder / 'tokenizer_config.json'}, or choose another base",
        )
    begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return f"{{%- set bos = {'bos_token' if begins else repr('')} -%}}\n{_REJECT_TOOLS}{_TURNS[chosen]}"
