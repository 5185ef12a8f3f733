"""The compression engine: MPO fits, metrics, menus, allocation, and applying a schedule to a torch model."""

import lazy_loader

# The names stand in __init__.pyi; each is imported when it is first used, so that `import compression` loads no torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
