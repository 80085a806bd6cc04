# SPDX-License-Identifier: Apache-2.0
"""Arrows only point down: which module may import which."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "llm_datadist_torch"
ROOT = Path(__file__).parents[1] / PACKAGE

# Floors, from the bottom to the top. The rooms of one floor do not know each other, but for those
# of one set, which are written together.
LAYERS: list[list[set[str]]] = [
    [{"_C"}, {"values"}],
    [{"net"}, {"observe"}, {"memory"}],
    [{"caches"}, {"transports"}],
    [{"serving"}],
    [{"links"}],
    [{"movement"}],
    [{"api"}],
    [{"compat"}],
    [{"", "public", "public_working", "ops", "ascend_sim"}],  # names only
    [{"cli", "__main__"}, {"vllm"}],
]
FLOORS = 10
ROOMS = 14

FILES = sorted(ROOT.rglob("*.py"))


def module_of(path: Path) -> str:
    """Dotted name below the package; "" is the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def place_of(module: str) -> tuple[int, int]:
    """(layer, room) of a module; the longest matching prefix counts."""
    name = module
    while True:
        for layer, rooms in enumerate(LAYERS):
            for number, room in enumerate(rooms):
                if name in room:
                    return layer, number
        assert "." in name, f"{module} has no place in LAYERS"
        name = name.rpartition(".")[0]


def imports_of(path: Path) -> dict[str, int]:
    """Modules of the package that a file imports anywhere -> line.

    Imports in functions and under TYPE_CHECKING count: who needs a type knows its owner.
    """
    found: dict[str, int] = {}

    def add(name: str, line: int) -> None:
        if name == PACKAGE or name.startswith(PACKAGE + "."):
            found.setdefault(name.removeprefix(PACKAGE).removeprefix("."), line)

    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            module = node.module or ""
            for alias in node.names:
                name = f"{module}.{alias.name}"
                below = name.removeprefix(PACKAGE + ".")
                is_module = below in MODULES or below == "_C"
                add(name if is_module else module, node.lineno)
    return found


IMPORTS = {module: imports_of(path) for module, path in MODULES.items()}


@pytest.mark.parametrize("module", sorted(MODULES), ids=lambda m: m or "__init__")
def test_imports_point_down(module):
    layer, room = place_of(module)
    upward = [
        f"{MODULES[module]}:{line} imports {name or '__init__'}"
        for name, line in IMPORTS[module].items()
        if place_of(name) != (layer, room) and place_of(name)[0] >= layer
    ]
    assert not upward


def test_no_cycles_between_modules():
    graph = {module: set(names) - {module} for module, names in IMPORTS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


def test_every_layer_exists():
    """A room that was renamed would otherwise silently lose its rule."""
    heads = {module.split(".")[0] for module in MODULES} | {"_C"}
    assert {name for rooms in LAYERS for room in rooms for name in room} == heads


def test_the_house_is_small():
    folders = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert len(LAYERS) <= FLOORS
    assert len(folders) + 1 <= ROOMS, "the names at the top are a room, too"


@pytest.mark.parametrize("module", sorted(MODULES), ids=lambda m: m or "__init__")
def test_environment_is_read_in_one_place_only(module):
    if module == "values.environment":
        return
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "environb"}:
            pytest.fail(f"{MODULES[module]}:{node.lineno} touches the environment")


@pytest.mark.parametrize("module", sorted(MODULES), ids=lambda m: m or "__init__")
def test_devices_are_named_in_memory_only(module):
    # doctor says what is installed.
    if module.split(".")[0] in {"memory", "values", "cli"}:
        return
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Constant) and node.value in {"npu", "cuda", "torch_npu"}:
            pytest.fail(f"{MODULES[module]}:{node.lineno} names a device")


@pytest.mark.parametrize("room", ["links", "serving", "movement", "api"])
def test_no_transport_in_particular_is_known(room):
    """All but the instance, which makes them, know what transports have in common."""
    common = {"transports.base", "transports.choice", "transports.movement"}
    for module in MODULES:
        if module.split(".")[0] == room and module != "links.instance":
            used = {name for name in IMPORTS[module] if name.split(".")[0] == "transports"}
            assert used <= common, module


def test_only_the_connector_imports_vllm():
    for module, path in MODULES.items():
        # What the connector's class is made of, and what differs between vLLM's versions.
        if module in {"vllm.connector", "vllm.metrics"} or module.startswith("vllm.compat."):
            continue
        # The plugin's function imports it when vLLM calls it; modules do so when they are imported.
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] == "vllm"], f"{path}:{node.lineno}"


def test_the_simulator_is_imported_by_its_command_and_its_alias_only():
    """It is a distribution of its own, which users of real NPUs have not installed."""
    for module, path in MODULES.items():
        if module in {"cli.sim", "ascend_sim"}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] == "ascend_sim"], (
                f"{path}:{node.lineno}"
            )


def test_validation_is_not_by_assert():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Assert), f"{path}:{node.lineno}"
