"""Who may import whom, stated once and read from the syntax tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from fnmatch import fnmatchcase
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("engines", "compat", "gateway", "migrations")
RECIPES = ROOT / "engines/store/demo"  # how the demo model was made; no part of the program

VOCABULARY = (
    *("engines.request", "engines.events", "engines.errors", "engines.options", "engines.model"),
    "engines.library",
)
WIRE = ("engines.wire", "engines.wire_tokens", "engines.wire_vectors")
HOUSE = ("compat.*", "engines.backend", *WIRE, "engines.store.*", "engines.chat.*", *VOCABULARY)
"""What the gateway builds on: nothing that runs a model in this process."""


class Row(NamedTuple):
    """Modules, and what they may import of ours and of others, the standard library aside."""

    modules: tuple[str, ...]
    ours: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()


TABLE = [
    Row(VOCABULARY, VOCABULARY),
    Row(("engines.process", "engines.backend", "engines.inference"), VOCABULARY),
    Row(("engines.watchdog",), ("engines.inference",)),
    Row(WIRE, ("engines.wire", *VOCABULARY), ("msgspec",)),
    Row(("engines.fake",), ("engines.inference", *VOCABULARY)),
    Row(("engines.worker",), ("engines.*",), ("psutil", "starlette", "uvicorn")),
    Row(("engines.store.registry_keys",), ("engines.store.blobs", *VOCABULARY), ("cryptography",)),
    Row(
        (*("engines.store.registry", "engines.store.registry_*"), "engines.store.transfer", "engines.store.upload"),
        ("engines.store.*", *VOCABULARY),
        ("httpx", "msgspec"),
    ),
    Row(("engines.store.*",), ("engines.store.*", "engines.chat.capabilities", *VOCABULARY), ("msgspec",)),
    Row(("engines.chat.sandbox",), ("engines.chat.meter", *VOCABULARY), ("jinja2",)),
    Row(("engines.chat.*",), ("engines.chat.*", *VOCABULARY), ("msgspec",)),
    Row(
        ("engines.llamacpp.backend",),
        (
            "engines.backend",
            "engines.inference",
            "engines.process",
            "engines.llamacpp.memory",
            "engines.store.gguf",
            *VOCABULARY,
        ),
    ),
    Row(("engines.llamacpp.quantizer",), ("engines.process", *VOCABULARY)),
    Row(
        (
            *("engines.llamacpp.header", "engines.llamacpp.hparams"),
            *("engines.llamacpp.layout", "engines.llamacpp.memory"),
        ),
        ("engines.llamacpp.hparams", "engines.llamacpp.layout", "engines.inference", "engines.store.*", *VOCABULARY),
    ),
    Row(("engines.llamacpp.kernels.*",)),
    Row(("engines.llamacpp.capi",), ("engines.llamacpp.kernels.library",)),
    Row(("engines.llamacpp.quantize",), ("engines.llamacpp.capi",)),
    Row(("engines.llamacpp.model",), ("engines.llamacpp.capi", *VOCABULARY), ("llguidance",)),
    Row(
        ("engines.llamacpp.context", "engines.llamacpp.embedding_context", "engines.llamacpp.sampler"),
        ("engines.llamacpp.capi", "engines.llamacpp.context", "engines.llamacpp.model", *VOCABULARY),
        ("numpy",),
    ),
    Row(
        ("engines.llamacpp.*",),
        ("engines.llamacpp.*", "engines.chat.*", "engines.store.gguf", "engines.inference", *VOCABULARY),
        ("llguidance", "numpy"),
    ),
    Row(("compat.services",), VOCABULARY),
    Row(("compat.body", "compat.streams", "compat.*.prefix"), ("compat.*", *VOCABULARY), ("starlette",)),
    Row(("compat.browser",), VOCABULARY, ("psutil", "starlette")),
    Row(
        ("compat.*.routes", "compat.*.account", "compat.*.library", "compat.*.transfers", "compat.*.transport"),
        ("compat.*", *VOCABULARY),
        ("msgspec", "starlette"),
    ),
    Row(("compat.vectors",), VOCABULARY, ("msgspec", "numpy")),
    Row(
        ("compat.model_runner.pull",),
        ("compat.*", "engines.store.docker", "engines.store.names", *VOCABULARY),
        ("msgspec",),
    ),
    Row(("compat.ollama.names",), ("compat.*", "engines.store.names", *VOCABULARY)),
    Row(
        ("compat.ollama.show",),
        ("compat.*", "engines.store.gojson", "engines.store.modelfile", *VOCABULARY),
        ("msgspec",),
    ),
    Row(("compat.*",), ("compat.*", *VOCABULARY), ("msgspec",)),
    Row(("gateway.__main__",), ("gateway.cli.main",)),
    Row(
        ("gateway.cli.*",),
        ("gateway.*", "engines.llamacpp.kernels.library", *HOUSE),
        ("httpx", "msgspec", "psutil", "rich", "typer"),
    ),
    Row(
        ("gateway.app",),
        ("gateway.*", "engines.llamacpp.backend", "engines.llamacpp.quantizer", *HOUSE),
        ("httpx", "psutil", "starlette", "uvicorn"),
    ),
    Row(("gateway.usage.*",), ("gateway.usage.*", *HOUSE), ("alembic", "sqlalchemy")),
    Row(("gateway.metrics",), ("gateway.*", *HOUSE), ("prometheus_client",)),
    Row(("gateway.settings",), ("gateway.*", *HOUSE), ("platformdirs",)),
    Row(("gateway.*",), ("gateway.*", *HOUSE), ("httptools", "msgspec", "psutil", "starlette")),
    Row(("migrations.*",), (), ("alembic", "sqlalchemy")),
]
"""The first row that names a module is its row."""

DIALECT_WORK = (
    *("compat.*.parse", "compat.*.render", "compat.*.schema", "compat.*.decode", "compat.*.errors"),
    *(
        "compat.*.embeddings",
        "compat.*.rerank",
        "compat.*.tokens",
        "compat.*.pull",
        "compat.relevance",
        "compat.vectors",
    ),
)
OUTSIDE_WORLD = {"asyncio", "os", "pathlib", "socket", "subprocess", "threading"}
CLOCKS = {"time.time", "time.time_ns", "time.monotonic", "datetime.now", "datetime.utcnow", "date.today"}


def module_name(path: Path) -> str:
    """The dotted name of a file."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


SOURCES = {
    module_name(path): path
    for floor in FLOORS
    for path in sorted((ROOT / floor).rglob("*.py"))
    if RECIPES not in path.parents
}


def imports_of(module: str, *, at_start: bool = False) -> set[str]:
    """Full names of the modules that one imports, anywhere in it or, `at_start`, when it is loaded itself."""
    tree = ast.parse(SOURCES[module].read_text())
    found: set[str] = set()
    for node in tree.body if at_start else ast.walk(tree):
        match node:
            case ast.Import(names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(parent, names, level):
                assert level == 0, f"{module} has a relative import"
                assert parent is not None
                submodules = {f"{parent}.{alias.name}" for alias in names} & SOURCES.keys()
                found |= submodules or {parent}
    return found


def matches(module: str, patterns: tuple[str, ...]) -> bool:
    """Whether a name is one of the patterns; `a.*` is the package `a` too."""
    return any(fnmatchcase(module, pattern) or module == pattern.removesuffix(".*") for pattern in patterns)


def row_of(module: str) -> Row:
    """What a module may import."""
    return next(row for row in (*TABLE, Row((module,))) if matches(module, row.modules))


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module: str) -> None:
    """A module imports what its row allows and nothing else."""
    row = row_of(module)
    for imported in imports_of(module):
        top = imported.partition(".")[0]
        if top in FLOORS:
            assert matches(imported, row.ours), f"{module} must not import {imported}"
        elif top not in sys.stdlib_module_names:
            assert top in row.libraries, f"{module} must not import {imported}"


def test_every_row_names_a_module() -> None:
    """The table speaks of what exists."""
    for row in TABLE:
        assert any(row_of(module) is row for module in SOURCES), row.modules


def test_only_the_entry_points_import_the_app() -> None:
    """`gateway.app` wires everything, so nothing below it may know it."""
    importers = {module for module in SOURCES if "gateway.app" in imports_of(module)}
    assert all(matches(module, ("gateway.__main__", "gateway.cli.*")) for module in importers)


def test_no_two_modules_need_each_other() -> None:
    """What is imported when a module is loaded forms no circle."""
    graph = {module: imports_of(module, at_start=True) & SOURCES.keys() for module in SOURCES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(SOURCES)


@pytest.mark.parametrize("module", [module for module in SOURCES if matches(module, DIALECT_WORK)])
def test_translation_has_no_clock_and_touches_nothing(module: str) -> None:
    """Parsing and rendering are functions of their arguments."""
    assert not imports_of(module) & OUTSIDE_WORLD
    tree = ast.parse(SOURCES[module].read_text())
    assert not {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)} & CLOCKS


@pytest.mark.parametrize("module", [module for module, path in SOURCES.items() if path.name == "__init__.py"])
def test_packages_hold_a_docstring_only(module: str) -> None:
    """Importing one module of a package loads no other."""
    tree = ast.parse(SOURCES[module].read_text())
    assert len(tree.body) == 1
    assert ast.get_docstring(tree)


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("gateway, gateway.cli.main, gateway.app", {"llama_cpp", "llguidance", "jinja2", "engines.worker"}),
        (
            "engines.worker, engines.llamacpp.engine",
            {"sqlalchemy", "alembic", "prometheus_client", "compat", "gateway"},
        ),
        ("engines.worker, engines.fake", {"llama_cpp", "llguidance", "numpy", "jinja2"}),
        (
            "engines.llamacpp.backend, engines.llamacpp.quantizer",
            {"llama_cpp", "llguidance", "starlette", "engines.worker"},
        ),
    ],
    ids=["gateway", "worker", "fake worker", "backend"],
)
def test_processes_load_only_what_they_need(modules: str, absent: set[str]) -> None:
    """The web process never holds llama.cpp, and a worker never the ledger."""
    program = f"import sys, {modules}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not absent & set(done.stdout.split())
