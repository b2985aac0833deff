"""The model behind LangChain: chat, shell pipelines and tool calling on the CPU."""
