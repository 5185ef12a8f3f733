"""Makes the file beside the weights that lets transformers and vLLM read a compressed folder without Chisel installed.

The file is assembled from the sources of this project, not written a second time: it copies verbatim every definition
that `search.hf` and `search.serving.backbone` need, directly or indirectly. Knows Python source text only.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from compression.refusal import Refusal
from search.serving.backbone import ARCHITECTURE

__all__ = ["standalone_source"]

_HF, _LOADING = "search.hf", ("register", "lora_layers", "ChiselQuantizer")
_BACKBONE, _SERVING = "search.serving.backbone", ("EngineConfig", "ordinary", "serve_backbone_")
_OURS = ("compression", "search")

_HEAD = '''"""Reads this folder's model: from_pretrained(DIR, trust_remote_code=True) of the class in config.json.

Made by Chisel from its sources; needs torch, safetensors and transformers 5.16 or newer, nothing else.
vLLM serves a causal language model too: vllm serve DIR --trust-remote-code.
"""

from __future__ import annotations
'''

_CHECK = """
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 16):
    raise ImportError(f"this folder needs transformers 5.16 or newer, and this is {transformers.__version__}")
"""

_TAIL = '''

register(replace=False)


class {config}({mixed}transformers.{config}):
    """The architecture's own configuration. Loading it from this file registers the plug-in."""


class {name}(transformers.{model}):
    """The architecture's own model."""

    config_class = {config}

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False, so that transformers initializes buffers that are not stored as in its own class."""
        return False
'''

_SERVED = '''
    @classmethod
    def from_pretrained(cls, place, *args, config=None, **kwargs):
        """Loads the model by the plug-in, which verifies what it reads."""
        if not isinstance(config, transformers.PretrainedConfig):
            config = {config}.from_pretrained(place if config is None else config)
        return super().from_pretrained(place, *args, config=ordinary(config, transformers.{config}), **kwargs)


class {base}(transformers.{base}):
    """The architecture's own model without its head, as an engine makes it that fills it with weights itself."""

    config_class = {config}

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        serve_backbone_(self, config)
'''


@dataclass(frozen=True)
class _Module:
    """The top-level statements of a source file.

    Attributes:
        text: the whole source text.
        definitions: name to the statement that binds it, in the order of the file.
        imports: name to the import statement that binds it, for imports from outside this project.
        ours: name to module, for names that are imported from this project.
    """

    text: str
    definitions: dict[str, ast.stmt]
    imports: dict[str, str]
    ours: dict[str, str]


def standalone_source(config: str, model: str, base: str) -> str:
    """Return the text of the file for one architecture; it is the same text on every call.

    Args:
        config, model: names of the architecture's configuration class and model class in transformers.
        base: name of that without a head, for engines; empty if the model is none that engines serve.

    Raises:
        ValueError: two modules define or import the same name, so that their definitions cannot share one file.
    """
    modules: dict[str, _Module] = {}
    wanted: dict[str, set[str]] = {}
    pending = [(_HF, name) for name in _LOADING] + [(_BACKBONE, name) for name in _SERVING if base]
    owner: dict[str, str] = {}
    imports: set[str] = {"import transformers"}

    def claim(name: str, by: str) -> None:
        if owner.setdefault(name, by) != by:
            raise Refusal(f"{owner[name]} and {by} both define {name}; one of them needs another name")

    while pending:
        module, name = pending.pop()
        if name in wanted.setdefault(module, set()):
            continue
        if module not in modules:
            modules[module] = _read(module)
        source = modules[module]
        wanted[module].add(name)
        claim(name, module)
        for used in _used(source.definitions[name]):
            if used in source.ours:
                pending.append((source.ours[used], used))
            elif used in source.imports:
                claim(used, source.imports[used])
                imports.add(source.imports[used])
            elif used in source.definitions:
                pending.append((module, used))
    parts = [_HEAD, *sorted(imports, key=lambda line: (line.startswith("from"), line)), _CHECK]
    for module in _ordered(modules):
        parts.append(f"\n# {module}\n")
        source = modules[module]
        chosen = {id(source.definitions[name]): source.definitions[name] for name in wanted[module]}
        parts += [_text(source.text, node) for node in sorted(chosen.values(), key=lambda node: node.lineno)]
    tail = _TAIL + _SERVED if base else _TAIL
    named = {"name": ARCHITECTURE, "mixed": "EngineConfig, "} if base else {"name": model, "mixed": ""}
    return "\n".join(parts) + tail.format(config=config, model=model, base=base, **named)


def _read(module: str) -> _Module:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    definitions: dict[str, ast.stmt] = {}
    imports: dict[str, str] = {}
    ours: dict[str, str] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            imports |= {(alias.asname or alias.name).partition(".")[0]: ast.unparse(node) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            for alias in node.names:
                if node.module.partition(".")[0] in _OURS:
                    assert alias.asname is None
                    ours[alias.name] = node.module
                else:
                    single = ast.ImportFrom(node.module, [alias], 0)
                    imports[alias.asname or alias.name] = ast.unparse(single)
        else:
            definitions |= dict.fromkeys(_bound(node), node)
    return _Module(text, definitions, imports, ours)


def _bound(node: ast.stmt) -> Iterator[str]:
    """Yield the names that a top-level statement binds."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def _used(node: ast.stmt) -> set[str]:
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}


def _ordered(modules: dict[str, _Module]) -> list[str]:
    """Sort modules so that each comes after those it imports from."""
    done: list[str] = []

    def visit(module: str) -> None:
        if module not in done:
            for other in sorted(set(modules[module].ours.values()) & modules.keys()):
                visit(other)
            done.append(module)

    for module in sorted(modules):
        visit(module)
    return done


def _text(text: str, node: ast.stmt) -> str:
    """Return the source text of a statement, with its decorators and, for functions and classes, blank lines before."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    lines = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    return f"\n\n{lines}" if isinstance(node, ast.FunctionDef | ast.ClassDef) else lines
