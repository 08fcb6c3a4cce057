"""Text, messages and tokens: how a conversation becomes what the model reads, and back again."""

from fourge.chat.deltas import Delta, to_message
from fourge.chat.output import OutputParser

__all__ = ["Delta", "OutputParser", "to_message"]
