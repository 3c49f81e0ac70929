"""
What is relied on inside other packages. When a release changes one of these, its test fails and names who relies on it:
read it again there, mend what it breaks, and add the new hash.
"""

import ast
import contextlib
import hashlib
import importlib
import inspect
import threading
from pathlib import Path

import pytest
import torch
import trl.trainer.utils
from torch._subclasses import FakeTensorMode
from trl.kernels import ChunkedLogProbFunction

from wit_trl import _upstream
from wit_trl.loss.lm_head import prepare_lm_head


# object: (parameters, hashes of its source in the releases that were run, who relies on it)
TABLE = {
    "trl.trainer.utils:add_fused_lm_head": (
        "model, temperature, cast_lm_head_to_fp32, outputs",
        {"422d009f04b6"},
        "loss.lm_head: what it returns; for the one-pass head, how it looks up and calls its kernel",
    ),
    "trl.trainer.utils:FusedCausalLMOutput": (
        "loss, log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1, label_mask, aux_loss",
        {"5ccdd6e41dcb"},
        "loss.lm_head, training.metrics: the per-token fields",
    ),
    "trl.kernels.chunked_logprob:ChunkedLogProbFunction": (
        "args, kwargs",
        {"3661e8975a9f"},
        "loss.functions: its arguments and results; loss.one_pass: ties of top-1",
    ),
    "trl.data_utils:_tokenize": (
        "processing_class, input, apply_chat_template_kwargs",
        {"5fc8cbcb4cac"},
        "conversation.turns, data.tokenization: the tokens of TRL",
    ),
    "trl.data_utils:common_prefix_length": (
        "ids, other_ids",
        {"34e85554d52b"},
        "conversation, data.tokenization: where TRL lets the completion begin",
    ),
    "trl.data_utils:get_dataset_column_names": (
        "dataset",
        {"9302e8ece123"},
        "data.schemas: the columns of a stream",
    ),
    "trl.trainer.utils:get_config_model_id": (
        "config",
        {"a7ceae253db0"},
        "config: the name of the output folder",
    ),
    "trl.trainer.utils:global_then_local_main_first": (
        "",
        {"eb8b684b1123"},
        "data: the order of the ranks",
    ),
    "trl:SFTTrainer.__init__": (
        (
            "self, model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_loss_func, "
            "compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics, "
            "quantization_config, peft_config, formatting_func"
        ),
        {"90b61e42b690"},
        "WITSFTTrainer.__init__: what is set before and after the data is prepared",
    ),
    "trl:SFTTrainer._prepare_dataset": (
        "self, dataset, processing_class, args, packing, formatting_func, dataset_name",
        {"04b668d28493"},
        "WITSFTTrainer._prepare_dataset, DataPreparation: what is read of a row, and what is labelled",
    ),
    "trl:SFTTrainer._set_signature_columns_if_needed": (
        "self",
        {"aaa1b89b48a6"},
        "WITSFTTrainer: the columns that the collator gets",
    ),
    "trl:SFTTrainer._reject_skip_prepare_without_labels": (
        "self, datasets, data_collator",
        {"7b9c33c829a6"},
        "WITSFTTrainer: what is allowed that TRL rejects",
    ),
    "trl:SFTTrainer.compute_loss": (
        "self, model, inputs, return_outputs, num_items_in_batch",
        {"ca448211ff65"},
        "WITSFTTrainer.compute_loss, ParallelMixin: how the loss is scaled",
    ),
    "trl:SFTTrainer.prediction_step": (
        "self, model, inputs, prediction_loss_only, ignore_keys",
        {"2db888fb0567"},
        "WITSFTTrainer.compute_loss: the step that subclasses override",
    ),
    "trl:SFTTrainer.log": (
        "self, logs, start_time",
        {"0d4c8e5d64f8"},
        "WITSFTTrainer.log: `_metrics`",
    ),
    "trl.trainer.sft_trainer:DataCollatorForLanguageModeling.torch_call": (
        "self, examples",
        {"e9f4cd36d5ba"},
        "DataCollatorForWIT: padding and flattening of `labels`",
    ),
    "trl.trainer.sft_trainer:DataCollatorForVisionLanguageModeling.torch_call": (
        "self, examples",
        {"cc6ce6ce44e1"},
        "DataCollatorForVisionLanguageWIT",
    ),
    "transformers:Trainer._run_epoch": (
        (
            "self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
            "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, "
            "steps_trained_in_current_epoch"
        ),
        {"31aff00f34c3"},
        "ParallelMixin._run_epoch: how it resumes, and where it looks for what skips batches",
    ),
    "transformers:Trainer._get_num_items_in_batch": (
        "self, batch_samples, device",
        {"a31fa106f70d"},
        "ParallelMixin: the divisor",
    ),
    "transformers:Trainer._prepare_context_parallel_inputs": (
        "self, model, inputs",
        {"b99570e1847c"},
        "ParallelMixin: the buffers that are split",
    ),
    "transformers:Trainer._prepare_inputs": (
        "self, inputs",
        {"8f8c4e430d2f"},
        "WITSFTTrainer: what DeepSpeed casts",
    ),
    "transformers:Trainer.evaluation_loop": (
        "self, dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix",
        {"a0fe4d6536f8"},
        "EvaluationMixin: the metrics, and how losses are gathered",
    ),
    "transformers.trainer_utils:sort_checkpoints": (
        "output_dir, checkpoint_prefix, use_mtime, best_model_checkpoint",
        {"dad8bd44da25"},
        "training.checkpoints: the order of the folders",
    ),
    "transformers:ProcessorMixin.get_text_with_replacements": (
        "self, text, images_replacements, videos_replacements, audio_replacements",
        {"25fbe1cc5216"},
        "data.vision_collator: what stands for an image",
    ),
    "accelerate:skip_first_batches": (
        "dataloader, num_batches",
        {"c3e05a215cb6", "e1e0d816d874"},
        "_upstream: what stands for it under sequence parallelism",
    ),
    "accelerate:Accelerator.gather_for_metrics": (
        "self, input_data, use_gather_object",
        {"ddc20a024757", "601e68c2b3e1"},
        "training.metrics: which examples fill up the last batch",
    ),
    "deepspeed.runtime.sequence_parallel.ulysses_sp:UlyssesSPDataLoaderAdapter": (
        "dl, sp_rank, sp_group, sp_world_size, device",
        {"1a44b6968527", "dff2a6ba02b7"},
        "_upstream: how its epochs are started and its batches skipped",
    ),
    "peft.utils.integrations:dequantize_module_weight": (
        "module",
        {"745bb18021ab"},
        "loss.lm_head: a quantized head",
    ),
    "peft.utils:ModulesToSaveWrapper": (
        "module_to_save, adapter_name, tied_module",
        {"0a45ffcf6a1d", "098fa076e9c4"},
        "_upstream.trained_copy: the copy that FSDP1 wraps by itself",
    ),
    "bitsandbytes.nn:Linear4bit.forward": (
        "self, x",
        {"d52cf6345771", "1e733c96b634"},
        "_upstream: the flag that turns off a kernel",
    ),
}


def look_up(path):
    module, _, name = path.partition(":")
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def parameters(found):
    return ", ".join(inspect.signature(found).parameters)


def source_hash(found):
    return hashlib.sha256(inspect.getsource(found).encode()).hexdigest()[:12]


def check(path):
    expected_parameters, hashes, who = TABLE[path]
    found = look_up(path)
    assert parameters(found) == expected_parameters, f"the parameters of {path} changed: read it again for {who}"
    assert source_hash(found) in hashes, f"the source of {path} changed: read it again for {who}"


@pytest.mark.parametrize("path", TABLE)
def test_nothing_that_is_relied_on_has_changed(path):
    check(path)


def test_a_change_is_named(monkeypatch):
    def get_dataset_column_names(dataset):
        return []

    monkeypatch.setattr("trl.data_utils.get_dataset_column_names", get_dataset_column_names)
    with pytest.raises(AssertionError, match=r"the source of trl\.data_utils:get_\S+ changed: .* for data\.schemas"):
        check("trl.data_utils:get_dataset_column_names")


def test_every_name_from_elsewhere_is_in_the_table():
    listed = {path.partition(":")[2].rpartition(".")[2] for path in TABLE}
    package = Path(_upstream.__file__).parent
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in package.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in nodes if node.module == "_upstream" for alias in node.names}
    assert {"tokenize_messages", "use_kernel"} <= names
    for name in names:
        found = getattr(_upstream, name)
        if callable(found) and not found.__module__.startswith("wit_trl"):
            assert found.__name__ in listed, name


def test_kernel_is_used_by_its_own_thread_alone():
    inputs = (torch.randn(3, 4), torch.randn(5, 4), None, torch.tensor([1, 2, 3]), 1.0, 32768, None, 1.0, ())
    expected = ChunkedLogProbFunction.apply(*inputs)[0]
    elsewhere = []
    with _upstream.use_kernel(lambda *args: "ours"):
        hook = trl.trainer.utils._ChunkedLogProbFunction
        assert hook.apply(*inputs) == "ours"
        thread = threading.Thread(target=lambda: elsewhere.append(hook.apply(*inputs)[0]))
        thread.start()
        thread.join()
    torch.testing.assert_close(elsewhere[0], expected)
    torch.testing.assert_close(hook.apply(*inputs)[0], expected)


def test_kernel_is_given_back_after_an_error():
    with pytest.raises(RuntimeError, match="stop"), _upstream.use_kernel(print):
        raise RuntimeError("stop")
    assert _upstream._kernel.get() is None


def test_hook_runs_on_the_device_of_a_model_that_is_split(make_model, monkeypatch):
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", ChunkedLogProbFunction)
    model = make_model()
    prepare_lm_head(model)
    assert trl.trainer.utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    model.hf_device_map = {"model": 0, "lm_head": 1}
    prepare_lm_head(model)
    devices, current = [], [0]

    @contextlib.contextmanager
    def device_index(index):
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    monkeypatch.setattr(ChunkedLogProbFunction, "apply", lambda hidden_states: devices.append(current[-1]))
    with FakeTensorMode():
        trl.trainer.utils._ChunkedLogProbFunction.apply(torch.ones(2, device="cuda:1"))
    assert devices == [1]
