"""Every file in `accelerate_configs/`, as accelerate itself reads it."""

import os
import warnings
from pathlib import Path

import pytest
import yaml
from accelerate.commands import launch
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env


SECTIONS = ("fsdp_config", "deepspeed_config", "parallelism_config")
CONFIGS = sorted((Path(__file__).parent.parent / "accelerate_configs").glob("*.yaml"))
# Another value for every entry that is not a bool
OTHER = {
    "BACKWARD_PRE": "BACKWARD_POST",
    "FULL_SHARD": "SHARD_GRAD_OP",
    "FULL_STATE_DICT": "SHARDED_STATE_DICT",
    "SHARD_GRAD_OP": "FULL_SHARD",
    "TRANSFORMER_BASED_WRAP": "NO_WRAP",
    "auto": 2,
    "none": "cpu",
    "sdpa": "flash_attention_2",
    2: 1,
    4: 2,
}


def test_one_file_for_each_way_to_launch():
    assert {path.stem for path in CONFIGS} == {
        *("single_device", "multi_gpu", "fsdp", "fsdp1", "fsdp_multi_node", "fsdp_qlora", "fsdp_context_parallel"),
        *("deepspeed_zero2", "deepspeed_zero3", "deepspeed_ulysses"),
    }


def parse(path):
    arguments = launch.launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    return launch._validate_launch_command(arguments)[0]  # raises on unknown keys


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_every_entry(path):
    config = yaml.safe_load(path.read_text())
    sections = [config.pop(name, {}) for name in SECTIONS]
    known = vars(launch.launch_command_parser().parse_args(["script.py"]))
    arguments = parse(path)
    for name in ("compute_environment", "distributed_type"):
        config.pop(name)
    for key, value in [*config.items(), *(item for section in sections for item in section.items())]:
        assert key in known, key
        assert getattr(arguments, key) == value, key


def plugin_state(path, monkeypatch):
    """What FSDP or DeepSpeed are configured with on the processes that the launcher starts. Warnings are errors:
    accelerate warns of entries that it ignores."""
    arguments = parse(path)
    arguments.deepspeed_fields_from_accelerate_config = ""  # as the launcher sets it, for an error message
    environment = (
        prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
    )
    with monkeypatch.context() as patch:
        patch.setattr("accelerate.utils.dataclasses.is_cuda_available", lambda: True)  # as FSDP1 asks on GPUs
        patch.setattr("torch.cuda.current_device", lambda: 0)
        for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_", "PARALLELISM_"))]:
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plugin = (DeepSpeedPlugin if arguments.use_deepspeed else FullyShardedDataParallelPlugin)()
        parallelism = repr(vars(ParallelismConfig()))
        if arguments.use_deepspeed:
            return plugin.deepspeed_config, plugin.zero3_init_flag, parallelism
        return {key: repr(value) for key, value in vars(plugin).items() if key != "param_init_fn"}, parallelism


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if "fsdp" in p.stem or "deepspeed" in p.stem], ids=lambda path: path.stem
)
def test_no_entry_is_ignored(path, tmp_path, monkeypatch):
    text = path.read_text()
    state = plugin_state(path, monkeypatch)
    config = yaml.safe_load(text)
    for name, key, value in [(s, *entry) for s in SECTIONS for entry in config.get(s, {}).items()]:
        if key in ("fsdp_version", "zero_stage"):  # decides what the other entries mean
            continue
        other = not value if isinstance(value, bool) else OTHER[value]
        changed = tmp_path / "config.yaml"
        changed.write_text(yaml.safe_dump({**config, name: {**config[name], key: other}}))
        try:
            assert plugin_state(changed, monkeypatch) != state, key
        except (UserWarning, ValueError) as contradiction:  # of another entry, so it is read
            assert "sync_module_states" in str(contradiction), key
