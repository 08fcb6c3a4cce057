"""The server: OpenAI- and Anthropic-compatible HTTP over the engine; one file per API surface."""
