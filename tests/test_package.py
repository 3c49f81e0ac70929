import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

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
