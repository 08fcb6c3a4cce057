"""Text, messages and tokens: how a conversation becomes what the model reads."""
