"""Prompt formats: the `alpaca` chat template, for base models that bring none of their own."""

from typing import Any

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


def alpaca_template(tokenizer: Any) -> str:
    """Give the `alpaca` chat template for a tokenizer.

    The template itself writes the BOS where the tokenizer would add one, because chat templates are
    tokenized without automatic special tokens: one source of BOS, in training and in chat alike.

    Args:
        tokenizer: A Hugging Face tokenizer with an EOS token.
    """
    first_ids = tokenizer("a").input_ids[:1]
    adds_bos = tokenizer.bos_token_id is not None and first_ids == [tokenizer.bos_token_id]
    return ("{{- bos_token -}}" if adds_bos else "") + _ALPACA
