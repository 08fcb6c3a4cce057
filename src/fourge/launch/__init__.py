"""A checkpoint and a machine -> a checked command for vLLM or SGLang; an old command -> one that
starts.
"""
