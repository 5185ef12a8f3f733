"""The compression engine: MPO fits, metrics, menus, allocation, and applying a schedule to a torch model."""

import lazy_loader

# __init__.pyi lists the names. Each is imported on first use, so `import compression` does not load torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
