"""An embedded inference engine: tokens in, tokens out; knows nothing of text."""
