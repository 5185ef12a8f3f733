"""The compression engine: MPO fits, metrics, menus, allocation, and applying a schedule to a torch model."""

import os

import lazy_loader

# oneDNN, which multiplies bfloat16 on a CPU, compiles one kernel for every shape. It keeps 1,024 of them, fewer than a
# model has whose matrices all differ in χ, and compiles the others again in every pass, which takes twice the time of a
# pass and memory that never comes back. Read at its first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")

# __init__.pyi lists the names. Each is imported on first use, so `import compression` does not load torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
