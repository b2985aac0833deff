"""Text and chats to token ids as training and chat make them, for both sides of a certificate.

The chat template's control tokens become ids, and the text between two of them is tokenized for
itself, with special tokens off; a control token typed in a message stays text. A tokenizer given the
whole rendered text differs from that in ways that mean nothing: at spaces behind a control token, say.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = Mapping[str, str]
Tokenize = Callable[[str], list[int]]


class PlainTokenizer:
    """A tokenizer with its control tokens and its chat template.

    Args:
        tokenize: Text to ids, special tokens off and no BOS.
        control: Text of every control token, with its id.
        template: Jinja source of the chat template.
        bos_token: Text of the BOS token, for templates that write it.
        eos_token: Text of the EOS token.
    """

    def __init__(
        self,
        tokenize: Tokenize,
        control: Mapping[str, int],
        template: str | None,
        bos_token: str,
        eos_token: str,
    ) -> None:
        self._tokenize = tokenize
        self._control = control
        self._template = template
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        names = sorted(filter(None, control), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names)) if names else r"(?!)")

    def text_ids(self, text: str, mark: str = "") -> list[int]:
        """Tokenize text as a template might have written it: its control tokens count."""
        ids: list[int] = []
        end = 0
        for found in self._pattern.finditer(text):
            ids += self._plain(text[end : found.start()], mark)
            ids.append(self._control[found[0]])
            end = found.end()
        return ids + self._plain(text[end:], mark)

    def _plain(self, text: str, mark: str) -> list[int]:
        text = text.replace(mark, "") if mark else text
        return self._tokenize(text) if text else []

    def chat_ids(
        self, messages: Sequence[Message], add_generation_prompt: bool = True
    ) -> list[int] | str:
        """Render messages up to the assistant's turn and tokenize; a string if that is refused.

        Without `add_generation_prompt` the messages are a whole conversation, as a training row is.
        """
        from jinja2 import TemplateError

        if not self._template:
            return "no chat template"
        used = set().union(*(turn["content"] for turn in messages))
        # Private use characters: no template and hardly any text has them.
        mark = next(mark for mark in map(chr, range(0xE000, 0xF8FF)) if mark not in used)
        broken = [
            {"role": turn["role"], "content": self._break_control(turn["content"], mark)}
            for turn in messages
        ]
        try:
            text = _environment().from_string(self._template)
            rendered = text.render(
                messages=broken, add_generation_prompt=add_generation_prompt, **self._tokens
            )
        except (TemplateError, ValueError, TypeError, OverflowError) as error:
            return f"refused: {error}"
        return self.text_ids(rendered, mark)

    def _break_control(self, text: str, mark: str) -> str:
        return self._pattern.sub(lambda found: found[0][0] + mark + found[0][1:], text)


def _environment() -> Any:
    """Make Jinja as chat does: sandboxed, with no date and no extra names."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _raise_exception(message: str) -> Any:
    from jinja2 import TemplateError

    raise TemplateError(message)


def of_transformers(tokenizer: Any) -> PlainTokenizer:
    """Take a Hugging Face tokenizer as training does.

    SentencePiece writes a space in front of every text, and so does llama.cpp; some fast tokenizers
    do not where the text starts with one. For those it is written here.
    """

    def ids_of(text: str) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return list(ids)

    plain = ids_of("a")
    is_sentencepiece = tokenizer.convert_ids_to_tokens(plain[:1])[0].startswith("▁")
    swallows_space = is_sentencepiece and plain == ids_of(" a")

    def tokenize(text: str) -> list[int]:
        starts_with_space = text.startswith((" ", "▁"))
        return ids_of(f" {text}" if swallows_space and starts_with_space else text)

    control = {
        added.content: token
        for token, added in tokenizer.added_tokens_decoder.items()
        if added.special
    }
    template = tokenizer.chat_template
    return PlainTokenizer(
        tokenize,
        control,
        template if isinstance(template, str) else None,
        tokenizer.bos_token or "",
        tokenizer.eos_token or "",
    )


def of_llama_cpp(model: Any) -> PlainTokenizer:
    """Take the tokenizer and the template of a GGUF as chat does."""
    import llama_cpp

    vocab = llama_cpp.llama_model_get_vocab(model.model)

    def text_of(token: int) -> str:
        text = llama_cpp.llama_vocab_get_text(vocab, token) if token >= 0 else b""
        return str((text or b"").decode("utf-8", "replace"))

    # llama.cpp gives the unknown token a kind of its own; to training it is a control token.
    kinds = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
    control = {
        text_of(token): token
        for token in range(model.n_vocab())
        if llama_cpp.llama_vocab_get_attr(vocab, token) & kinds
    }
    names = {token: text for text, token in control.items()}
    return PlainTokenizer(
        lambda text: list(model.tokenize(text.encode("utf-8"), add_bos=False, special=False)),
        control,
        model.metadata.get("tokenizer.chat_template"),
        names.get(model.token_bos(), ""),
        names.get(model.token_eos(), ""),
    )
