"""The compression engine: MPO fits, metrics, menus, allocation, and applying a schedule to a torch model."""

import os

import lazy_loader

# oneDNN, which multiplies 16-bit numbers on a CPU, compiles a kernel for every shape. It keeps 1,024 of them, fewer
# than the training of a model needs whose matrices all differ in χ, and compiled the others again in every pass, which
# took as long as the pass. Read at its first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "2048")
# __init__.pyi lists the names. Each is imported on first use, so `import compression` does not load torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
