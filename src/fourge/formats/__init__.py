"""Number formats on disk: bytes and their arithmetic, no model, no file.

layout.py     shapes of the stored tensors (torch-free)
e2m1.py       4-bit floats: the one rounding, and nibble packing
fp8.py        float8_e4m3fn casts
nvfp4.py      the readable NVFP4 quantizer: the truth
kernels/      the same arithmetic fast, on CPU (numba) and CUDA (Triton)
"""
