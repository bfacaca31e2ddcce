"""The packages' arrows: who may import whom, what stays out of light modules, and that every module says what it is."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("engine", "kernels", "scheduler", "launch", "bench")
MAY_IMPORT = {
    "kernels": set(),
    "scheduler": set(),
    "engine": {"scheduler", "kernels"},
    "launch": {"engine", "scheduler", "kernels"},
    "bench": {"launch", "engine", "scheduler", "kernels"},
    "": {"bench", "launch", "engine", "scheduler", "kernels"},  # __init__ and __main__
}
# Modules that are read before any model is: the command line, the configuration, the messages.
LIGHT = ["__init__", "__main__", "launch/__init__", "launch/cli", "launch/outputs", "bench/__init__"]
LIGHT += ["engine/__init__", "engine/config", "engine/params", "engine/messages"]
HEAVY = {"torch", "transformers", "fastapi", "uvicorn", "numba", "numpy", "triton", "huggingface_hub", "openai"}
# A scheduler decides from integers: no tensors, no processes, no time of its own.
NOT_IN_SCHEDULER = {"torch", "transformers", "zmq", "time", "datetime", "asyncio", "threading", "random"}

FILES = [*ROOT.glob("*.py"), *(f for p in PACKAGES for f in (ROOT / p).rglob("*.py"))]
NAMES = sorted(str(f.relative_to(ROOT).with_suffix("")) for f in FILES)


def source_of(name: str) -> str:
    return (ROOT / f"{name}.py").read_text()


def imports(source: str, module: str, *, top_level: bool = False) -> set[str]:
    """Full names of what `module` (as `engine/worker`) imports; names from our package begin with `moeyard.`.

    With `top_level` only what importing the module itself imports: not inside functions nor under TYPE_CHECKING.
    """
    found: set[str] = set()
    package = ["moeyard", *module.split("/")[:-1]]

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            found.update(".".join([*base, alias.name]) for alias in node.names)
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if top_level and (lazy or typing):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def home(name: str) -> str | None:
    """The package of ours that the full name of an import is in; "" for the root, None for others' modules."""
    parts = name.split(".")
    if parts[0] != "moeyard":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in PACKAGES else ""


def outsiders(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_the_parser_of_imports_sees_what_python_sees():
    source = (
        "import os.path\nfrom ..scheduler.blocks import BlockPool\nfrom . import config\nfrom .. import __version__\n"
        "if TYPE_CHECKING:\n    import typed\ndef f():\n    import lazy\n    from moeyard.bench import serve\n"
    )
    top = {"os.path", "moeyard.scheduler.blocks.BlockPool", "moeyard.engine.config", "moeyard.__version__"}
    assert imports(source, "engine/x", top_level=True) == top
    assert imports(source, "engine/x") == top | {"typed", "lazy", "moeyard.bench.serve"}
    assert {home(n) for n in top} == {None, "scheduler", "engine", ""}


@pytest.mark.parametrize("name", NAMES)
def test_arrows_point_down(name):
    package = name.split("/")[0] if "/" in name else ""
    for imported in imports(source_of(name), name):
        target = home(imported)
        if target == "":  # the root holds names for users; only the version is for us
            assert imported == "moeyard.__version__", f"{name} imports {imported}"
        elif target is not None and target != package:
            assert target in MAY_IMPORT[package], f"{name} imports {imported}"


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy(name):
    """Followed through our own modules: an import of an import counts."""
    seen, todo = set(), [name]
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        names = imports(source_of(module), module, top_level=True)
        assert not outsiders(names) & HEAVY, f"{name} reaches {module}, which imports {outsiders(names) & HEAVY}"
        for imported in names:
            if home(imported) is not None:
                path = imported.split(".")[1:]
                todo += [p for p in ("/".join(path), "/".join(path[:-1])) if (ROOT / f"{p}.py").is_file()]


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("scheduler/")])
def test_the_scheduler_has_no_tensors_and_no_clock(name):
    assert not outsiders(imports(source_of(name), name)) & NOT_IN_SCHEDULER


@pytest.mark.parametrize("name", NAMES)
def test_every_module_says_what_it_is(name):
    assert ast.get_docstring(ast.parse(source_of(name))), f"{name} has no docstring"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_unpickled(name):
    assert not outsiders(imports(source_of(name), name)) & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
