"""A local process that speaks the wire of Azure OpenAI's chat completions."""
