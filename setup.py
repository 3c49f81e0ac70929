"""The packages, which setup.cfg can either find or list: the wheel ships `accelerate_configs/` within `wit_trl`."""

from setuptools import find_packages, setup


CONFIGS = "wit_trl.accelerate_configs"

setup(
    packages=[*find_packages(include=["wit_trl", "wit_trl.*"]), CONFIGS],
    package_dir={CONFIGS: "accelerate_configs"},
)
