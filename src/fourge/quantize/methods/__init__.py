"""Quantization methods: each turns one expert's weights and what was seen of its inputs into NVFP4
tensors of the same names, shapes and cost.

``METHODS`` maps a recipe's ``method`` to them; recipe.py has the same names, and what they need.
"""

from fourge.quantize.methods import descent, four_over_six, gptq, search
from fourge.quantize.methods import max as max_method
from fourge.quantize.methods.expert import Method

METHODS: dict[str, Method] = {
    "max": Method(max_method.quantize_expert),
    "four-over-six": Method(four_over_six.quantize_expert, ("max",)),
    "mse": Method(search.quantize_expert, ("max",)),
    "weighted-mse": Method(search.quantize_expert, ("max",)),
    "local-hessian": Method(search.quantize_expert, ("max",)),
    "local-hessian+gptq": Method(gptq.quantize_expert, ("max", "local-hessian")),
    "local-hessian+descent": Method(descent.quantize_expert, ("max", "local-hessian")),
}
