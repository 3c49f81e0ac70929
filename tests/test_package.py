import importlib.metadata
from pathlib import Path

import wit_trl


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
