import importlib.metadata
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

import wit_trl


def test_public_names():
    assert wit_trl.__all__ == [
        "DataCollatorForWIT",
        "WITSFTConfig",
        "WITSFTTrainer",
        "weighted_linear_cross_entropy",
        "wit_loss",
    ]
    for name in wit_trl.__all__:
        assert getattr(wit_trl, name).__doc__


def test_version_and_type_marker():
    assert importlib.metadata.version("wit_trl") == wit_trl.__version__
    assert (Path(wit_trl.__file__).parent / "py.typed").exists()


CONFIGS = sorted((Path(__file__).parent.parent / "accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_every_config_whole(path):
    config = load_config_from_file(str(path)).to_dict()  # raises on unknown keys
    for key, value in yaml.safe_load(path.read_text()).items():
        assert config[key] == value


def test_expected_configs_are_there():
    assert {"single_device", "multi_gpu", "fsdp"} <= {path.stem for path in CONFIGS}
