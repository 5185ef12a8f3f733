"""The one file beside the weights."""

import ast
import sys
import types

import pytest

from search.export import standalone
from search.export.standalone import standalone_source

SOURCE = standalone_source("LlamaConfig", "LlamaForCausalLM", "LlamaModel")


def test_it_imports_nothing_of_ours_and_only_what_transformers_brings():
    allowed = {"torch", "transformers", "safetensors", *sys.stdlib_module_names}
    tops = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            tops |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            tops.add(node.module.split(".")[0])
    assert tops - allowed == {"peft"}  # asked for inside a try, when somebody wants LoRA


def test_it_is_the_same_text_every_time():
    assert standalone_source("LlamaConfig", "LlamaForCausalLM", "LlamaModel") == SOURCE


def test_it_defines_every_name_that_it_uses_once():
    module = types.ModuleType("modeling")
    sys.modules["modeling"] = module
    try:
        exec(compile(SOURCE, "modeling.py", "exec"), module.__dict__)
    finally:
        del sys.modules["modeling"]
    tops = [node.name for node in ast.parse(SOURCE).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(tops) == len(set(tops))
    known = vars(module).keys() | vars(__import__("builtins")).keys()
    for node in ast.parse(SOURCE).body:
        local = {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
        local |= {each.arg for each in ast.walk(node) if isinstance(each, ast.arg)}
        local |= {each.name for each in ast.walk(node) if isinstance(each, ast.FunctionDef | ast.ClassDef)}
        local |= {each.name for each in ast.walk(node) if isinstance(each, ast.ExceptHandler)}
        local |= {
            alias.asname or alias.name
            for each in ast.walk(node)
            if isinstance(each, ast.ImportFrom | ast.Import)
            for alias in each.names
        }
        used = {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Load)}
        assert used <= known | local


def test_an_older_version_of_transformers_is_told_which_it_needs():
    older = types.SimpleNamespace(__version__="5.15.2")
    [check] = [node for node in ast.parse(SOURCE).body if isinstance(node, ast.If)]
    with pytest.raises(ImportError, match=r"needs transformers 5\.16 or newer, and this is 5\.15\.2"):
        exec(compile(ast.Module([check], []), "modeling.py", "exec"), {"transformers": older})


def test_two_things_of_one_name_are_refused(monkeypatch):
    read = standalone._read

    def clashing(module):
        source = read(module)
        if module == "compression.layers.skeleton":
            node = ast.parse("def _values(): return put_skeleton_").body[0]
            source.definitions["_values"] = node
            source.definitions["describe"] = ast.parse("def describe(model): return _values()").body[0]
        return source

    monkeypatch.setattr(standalone, "_read", clashing)
    with pytest.raises(ValueError, match="both define _values"):
        standalone_source("LlamaConfig", "LlamaForCausalLM", "LlamaModel")


def test_a_name_that_one_module_imports_and_another_defines_is_refused(monkeypatch):
    read = standalone._read

    def clashing(module):
        source = read(module)
        if module == "compression.layers.skeleton":
            source.imports["_factor"] = "from somewhere import other as _factor"
            source.definitions["describe"] = ast.parse("def describe(model): return _factor(linear_layer)").body[0]
        if module == "compression.bonds":
            source.definitions["linear_layer"] = ast.parse("def linear_layer(weight): return _factor(weight)").body[0]
            source.definitions["_factor"] = ast.parse("def _factor(weight): return weight").body[0]
        return source

    monkeypatch.setattr(standalone, "_read", clashing)
    with pytest.raises(ValueError, match="both define _factor"):
        standalone_source("LlamaConfig", "LlamaForCausalLM", "LlamaModel")
