"""The three tools that the model can call: text in, text out, and nothing else touched.

Import `TOOLS`, or a single tool from the module of the same name
(`from tools.text_formatter import text_formatter`): re-exporting it here would hide its module.
"""

from langchain_core.tools import BaseTool

from tools import content_validator, template_generator, text_formatter

__all__ = ["TOOLS"]

# The order is part of the prompt that the model was trained on.
TOOLS: list[BaseTool] = [
    text_formatter.text_formatter,
    template_generator.template_generator,
    content_validator.content_validator,
]
