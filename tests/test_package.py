import ast
import graphlib
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import wit_trl


REPOSITORY = Path(__file__).parent.parent


def test_public_names():
    assert wit_trl.__all__ == [
        "DataCollatorForVisionLanguageWIT",
        "DataCollatorForWIT",
        "WITSFTConfig",
        "WITSFTTrainer",
        "to_trl_format",
        "weighted_linear_cross_entropy",
        "wit_loss",
    ]
    for name in wit_trl.__all__:
        assert getattr(wit_trl, name).__doc__


def test_version_and_type_marker():
    assert importlib.metadata.version("wit_trl") == wit_trl.__version__
    assert (Path(wit_trl.__file__).parent / "py.typed").exists()


def test_wheel_has_every_file_of_the_package_and_the_configurations(tmp_path):
    for name in ("wit_trl", "accelerate_configs"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tmp_path)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120, check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "wit_trl").rglob("*") if path.is_file()}
    configurations = {f"wit_trl/accelerate_configs/{path.name}" for path in (tmp_path / "accelerate_configs").iterdir()}
    assert shipped == package | configurations
    assert {"wit_trl/py.typed", "wit_trl/cli/sft.py", "wit_trl/accelerate_configs/fsdp.yaml"} <= shipped


# From the bottom to the top: a module imports from those of its own floor and of the floors before
FLOORS = (
    *(("weights", "_upstream", "embedded"), ("conversation", "loss"), ("config",), ("data",), ("report",)),
    *(("training",), ("trainer",), ("check",), ("cli",), ("sweep",)),
)
PACKAGE = REPOSITORY / "wit_trl"


def imports_of(path, package=PACKAGE):
    """The modules of the package that a module imports, wherever in it and for whatever purpose."""
    folder = path.relative_to(package).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[2] for name in node.names if name.name.split(".")[0] == "wit_trl")
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "wit_trl"):
            base = folder[: len(folder) - node.level + 1] if node.level else ()
            module = [*base, *(node.module or "").removeprefix("wit_trl").split(".")]
            parts = [part for part in module if part]
            for name in node.names:
                inner = package.joinpath(*parts, name.name)
                is_module = inner.with_suffix(".py").exists() or inner.is_dir()
                yield ".".join([*parts, name.name] if is_module else parts)


def graph_of(package=PACKAGE):
    modules = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        modules[".".join(parts).removesuffix(".__init__")] = {*imports_of(path, package)}
    return modules


def test_imports_go_down_only_and_in_no_circle():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    graph = graph_of()
    del graph["__init__"], graph["__main__"]  # the public names, and `python -m wit_trl`
    for module, imported in graph.items():
        for name in imported - {"", "__init__"}:  # the version
            assert floor[name.split(".")[0]] <= floor[module.split(".")[0]], f"{module} imports {name}"
    graphlib.TopologicalSorter({module: imported - {module} for module, imported in graph.items()}).prepare()


def test_an_import_upwards_and_a_circle_of_types_are_found(tmp_path):
    package = tmp_path / "wit_trl"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    with (package / "weights.py").open("a") as file:
        file.write("\nif TYPE_CHECKING:\n    from .data.collator import DataCollatorForWIT\n")
    graph = graph_of(package)
    assert "data.collator" in graph["weights"]
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_modules_are_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= (300 if path.name == "trainer.py" else 320)
