"""Writes Ollama's Modelfile, whose Go template has to render the same text as the base's chat template.

Ollama cannot read chat templates. Known kinds of template are recognized by their output, not by their source text.
Templates of other kinds are rejected. This module does not read weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from svc.errors import TrainingError
from svc.model_folder.chat_template import TemplateKwargs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Turns = Sequence[tuple[str, str]]
_TURNS: _Turns = (("system", "Be brief."), ("user", "One?"), ("assistant", "Yes."), ("user", "Two?"))


@dataclass(frozen=True, slots=True)
class TemplateKind:
    """A format in which chat templates render conversations.

    Attributes:
        before: text before a turn's content, with `{}` for the role.
        after: text after a turn's content.
        stops: strings at which Ollama stops an answer.
    """

    name: str
    before: str
    after: str
    stops: tuple[str, ...]

    def render(self, turns: _Turns) -> str:
        """Render a conversation and the beginning of the next answer."""
        said = "".join(f"{self.before.format(role)}{content}{self.after}" for role, content in turns)
        return said + self.before.format("assistant")

    def go_template(self, answer_prefix: str) -> str:
        """Return the Go template that renders the same text as `render`."""
        turn = f"{self.before.format('{{ .Role }}')}{{{{ .Content }}}}{self.after}"
        return f"{{{{- range .Messages }}}}{turn}{{{{ end }}}}{self.before.format('assistant')}{answer_prefix}"


KINDS = (
    TemplateKind("chatml", "<|im_start|>{}\n", "<|im_end|>\n", ("<|im_start|>", "<|im_end|>")),
    TemplateKind(
        "llama3",
        "<|start_header_id|>{}<|end_header_id|>\n\n",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
)


def make_modelfile(tokenizer: "PreTrainedTokenizerBase", template_kwargs: TemplateKwargs, weights: str) -> str:
    """Return the contents of a Modelfile.

    Args:
        tokenizer: the base's tokenizer, with its chat template.
        template_kwargs: arguments of the chat template.
        weights: name of the GGUF file in the same folder.

    Raises:
        TrainingError: the chat template is not of a known kind.
    """

    def render(turns: _Turns) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        text = str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template_kwargs)
        )
        bos = tokenizer.bos_token  # Ollama adds it where the file says so
        return text.removeprefix(bos) if bos and tokenizer("")["input_ids"] == [tokenizer.bos_token_id] else text

    kind = next((kind for kind in KINDS if render(_TURNS).startswith(kind.render(_TURNS))), None)
    if kind is None:
        raise TrainingError(
            f"the chat template of {tokenizer.name_or_path} cannot be converted to an Ollama template",
            expected=f"a template that renders exactly like {' or '.join(known.name for known in KINDS)}",
            todo="export with --no-modelfile: llama.cpp reads the template from the GGUF file",
        )
    prefix = render(_TURNS).removeprefix(kind.render(_TURNS))
    lines = [f"FROM ./{weights}", f'TEMPLATE """{kind.go_template(prefix)}"""']
    lines += [f'SYSTEM """{system}"""'] if (system := _default_system(kind, render, prefix)) else []
    return "\n".join([*lines, *(f'PARAMETER stop "{stop}"' for stop in kind.stops)]) + "\n"


def _default_system(kind: TemplateKind, render: Callable[[_Turns], str], prefix: str) -> str:
    """Return the system message that the chat template adds to a conversation without one, or an empty string.

    Raises:
        TrainingError: the template adds text that is not a system message.
    """
    turns = _TURNS[1:]
    text, plain = render(turns), kind.render(turns) + prefix
    added = text.removesuffix(plain).removeprefix(kind.before.format("system")).removesuffix(kind.after)
    is_system = text in (plain, kind.render((("system", added), *turns)) + prefix)
    if not is_system or '"""' in added or added.startswith('"') or added.endswith('"'):  # read as a part of the quotes
        raise TrainingError(
            "if a conversation has no system message, the chat template adds text that Ollama cannot add",
            expected="a template that adds no text, or only a default system message",
            todo="export with --no-modelfile: llama.cpp reads the template from the GGUF file",
        )
    return added if text != plain else ""
