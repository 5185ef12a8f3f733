"""The one file beside the weights with which transformers reads a compressed folder where nothing of ours is installed.

It is made from the sources of this project, not written a second time: of every module that `search.hf` needs, the
definitions that it needs, each as it stands. Knows Python source text only.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from compression.refusal import Refusal

__all__ = ["MODULE", "standalone_source"]

MODULE = "modeling_chisel"
"""The file's name without .py, as config.json's `auto_map` has it."""

_ROOT = "search.hf"
_OURS = ("compression", "search")

_HEAD = '''"""Reads this folder's model: AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True).

Made by Chisel from its sources; needs torch, safetensors and transformers 5.23 or newer, nothing else.
"""

from __future__ import annotations
'''

_TAIL = '''

register(replace=False)


class {config}(transformers.{config}):
    """The architecture's own configuration; being here, it is loaded from this file, which registers the plug-in."""


class {model}(transformers.{model}):
    """The architecture's own model."""

    config_class = {config}
'''


@dataclass(frozen=True)
class _Module:
    """A source file taken apart.

    Attributes:
        definitions: statements by the names that they bind, in order.
        imports: foreign import statements, one name each, by the name that they bind.
        ours: what is imported from this project: name to module.
    """

    text: str
    definitions: dict[str, ast.stmt]
    imports: dict[str, str]
    ours: dict[str, str]


def standalone_source(config: str, model: str) -> str:
    """The file for an architecture, the same text every time.

    Args:
        config, model: names of its classes in transformers.

    Raises:
        ValueError: two modules define different things under one name, so that they cannot stand in one file.
    """
    modules: dict[str, _Module] = {}
    wanted: dict[str, set[str]] = {}
    pending = [(_ROOT, name) for name in ("register", "lora_layers", "ChiselQuantizer")]
    owner: dict[str, str] = {}
    imports: set[str] = {"import transformers"}
    while pending:
        module, name = pending.pop()
        source = modules.setdefault(module, _read(module))
        if name in wanted.setdefault(module, set()):
            continue
        wanted[module].add(name)
        if owner.setdefault(name, module) != module:
            raise Refusal(f"{owner[name]} and {module} both define {name}; one of them needs another name")
        for used in _used(source.definitions[name]):
            if used in source.ours:
                pending.append((source.ours[used], used))
            elif used in source.imports:
                imports.add(source.imports[used])
            elif used in source.definitions:
                pending.append((module, used))
    parts = [_HEAD, *sorted(imports, key=lambda line: (line.startswith("from"), line))]
    for module in _ordered(modules):
        parts.append(f"\n# {module}\n")
        source = modules[module]
        chosen = {id(source.definitions[name]): source.definitions[name] for name in wanted[module]}
        parts += [_text(source.text, node) for node in sorted(chosen.values(), key=lambda node: node.lineno)]
    return "\n".join(parts) + _TAIL.format(config=config, model=model)


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
    """Names that a top-level statement binds."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def _used(node: ast.stmt) -> set[str]:
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}


def _ordered(modules: dict[str, _Module]) -> list[str]:
    """Every module behind those that it imports from."""
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
    """A statement as it is written, with decorators and the blank lines before it."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    lines = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    return f"\n\n{lines}" if isinstance(node, ast.FunctionDef | ast.ClassDef) else lines
