"""Quantization methods: each turns one expert's weights into NVFP4 tensors.

``METHODS`` maps a recipe's ``method`` to its function; recipe.py lists the same names.
"""

from fourge.quantize.methods import max as max_method
from fourge.quantize.methods.expert import Method

METHODS: dict[str, Method] = {"max": max_method.quantize_expert}
