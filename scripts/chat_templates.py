"""Prompt formats: the `alpaca` chat template, and a model's own one made fit for training.

What is changed is changed in the template itself, because the same text is saved with the tokenizer,
carried by the GGUF and rendered by chat: training and chat cannot drift apart.
"""

from dataclasses import dataclass, field
from typing import Any

from scripts._cli import CommandError
from scripts.answer_spans import RenderError, compile_template
from scripts.plain_tokens import control_tokens

# One conversation: "### Instruction:\n…\n\n### Response:\n…<eos>\n\n", a system turn in front as plain text.
_ALPACA = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] + '\n\n' }}"
    "{%- elif message['role'] == 'user' -%}"
    "{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}"
    "{%- else -%}{{ raise_exception('alpaca knows system, user and assistant turns, got ' + message['role']) }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '### Response:\n' }}{%- endif -%}"
)
# Each prelude ends in an expression: after a block, Jinja would eat the template's first newline.
_FOLD_SYSTEM = (
    "{%- if messages and messages[0]['role'] == 'system' and messages | length > 1"
    " and messages[1]['role'] == 'user' -%}"
    "{%- set messages = [{'role': 'user', 'content':"
    " messages[0]['content'] + '\n\n' + messages[1]['content']}] + messages[2:] -%}"
    "{%- endif -%}{{- '' }}"
)
_WRITE_BOS = "{{- bos_token }}"
FOLDED = "the template takes no system turn: it is put in front of the first user turn"
BOS_WRITTEN = "the template writes no BOS, which this tokenizer adds to text: now it does"

_SYSTEM = {"role": "system", "content": "probe system"}
_CHAT = [
    {"role": "user", "content": "probe question one"},
    {"role": "assistant", "content": "probe answer one"},
    {"role": "user", "content": "probe question two"},
    {"role": "assistant", "content": "probe answer two"},
]
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|vision_pad|>")


@dataclass(frozen=True)
class PreparedTemplate:
    """A chat template to set on the tokenizer.

    Attributes:
        source: Jinja.
        notes: What was changed in the model's own template; empty when nothing was.
    """

    source: str
    notes: list[str] = field(default_factory=list)


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a BOS in front of plain text."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [
        tokenizer.bos_token_id
    ]


def alpaca_template(tokenizer: Any) -> str:
    """Give the `alpaca` chat template for a tokenizer.

    The template itself writes the BOS where the tokenizer would add one, because chat templates are
    tokenized without automatic special tokens: one source of BOS, in training and in chat alike.

    Args:
        tokenizer: A Hugging Face tokenizer with an EOS token.
    """
    return ("{{- bos_token -}}" if adds_bos(tokenizer) else "") + _ALPACA


def prepare_template(tokenizer: Any, prompt_format: str) -> PreparedTemplate:
    """Give the chat template of a prompt format, the model's own one made fit for training.

    A model's own template is tried on small conversations. One that refuses or drops a system turn,
    or shows it elsewhere as the conversation goes on, gets it in front of the first user turn; one
    that leaves the BOS to the tokenizer gets it written.

    Args:
        tokenizer: A Hugging Face tokenizer.
        prompt_format: ``alpaca`` or ``model``.

    Raises:
        CommandError: ``model`` is asked for and there is no template, or it is no valid Jinja.
    """
    if prompt_format == "alpaca":
        return PreparedTemplate(alpaca_template(tokenizer))
    own = tokenizer.chat_template
    if isinstance(own, dict):  # several named ones, as for tools
        own = own.get("default")
    if not own:
        raise CommandError(
            "the model has no chat template; set prompt_format: alpaca in the recipe"
        )
    try:
        compile_template(own)
    except RenderError as error:
        raise CommandError(str(error)) from error
    source, notes = own, []
    bos = tokenizer.bos_token
    plain = _render(tokenizer, own, _CHAT)
    if bos and plain is not None and adds_bos(tokenizer) and not plain.startswith(bos):
        source = _WRITE_BOS + source
        notes.append(BOS_WRITTEN)
    if not _shows_system(tokenizer, source):
        folded = _FOLD_SYSTEM + source
        same = _render(tokenizer, folded, _CHAT) == _render(tokenizer, source, _CHAT)
        # Where this does not help the template has other faults, and rendering the rows names them.
        if same and _shows_system(tokenizer, folded):
            source = folded
            notes.insert(0, FOLDED)
    return PreparedTemplate(source, notes)


def _render(tokenizer: Any, source: str, messages: list[dict[str, str]]) -> str | None:
    from jinja2 import TemplateError

    try:
        return compile_template(source).render(
            messages=messages,
            add_generation_prompt=False,
            bos_token=tokenizer.bos_token or "",
            eos_token=tokenizer.eos_token or "",
        )
    except (TemplateError, TypeError, ValueError):
        return None


def _shows_system(tokenizer: Any, source: str) -> bool:
    """Whether a system turn is shown, in one place however long the conversation is."""
    whole = _render(tokenizer, source, [_SYSTEM, *_CHAT])
    start = _render(tokenizer, source, [_SYSTEM, *_CHAT[:2]])
    if whole is None or start is None:
        return False
    return _SYSTEM["content"] in start and whole.startswith(start.rstrip())


def ensure_pad_token(tokenizer: Any) -> str:
    """Give the tokenizer a pad token from its own vocabulary, and return it.

    Padding is masked by position, so sharing an id with EOS would hide no end of an answer; a token
    of its own is still easier to read, and other programs that train on the adapter's tokenizer may
    mask by id. Adding one would grow the vocabulary and break the GGUF.
    """
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        names = control_tokens(tokenizer)
        reserved = sorted(name for name in names if "reserved" in name)
        choices = [name for name in _PAD_NAMES if name in names]
        choices += [tokenizer.unk_token] if tokenizer.unk_token in names else []
        tokenizer.pad_token = next(iter([*choices, *reserved]), tokenizer.eos_token)
    return tokenizer.pad_token
