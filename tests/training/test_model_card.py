"""What the model card says."""

import wit_trl

from ..helpers import make_trainer


SETTINGS = (
    "- prompt_loss_weight: 0.2",
    "- completion_loss_weight: 0.8",
    "- role_loss_weights: None",
    "- span_loss_weights: None",
    "- regex_loss_weights: None",
    "- chat_template_loss_weight: 1.0",
    "- completion_turns: all",
)


def test_model_card_cites_the_paper(rows, make_model, tokenizer, config_kwargs, tmp_path):
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs)
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert "On the Effect of Instruction Tuning Loss on Generalization" in card
    assert "huggingface.co/papers/2507.07817" in card
    assert "@article{chatterjee2025effect" in card
    assert "- wit\n" in card
    assert card.endswith(
        "\n".join(["## Settings of the loss\n", *SETTINGS, "- loss_type: nll", "- loss_divisor: count\n"])
    )
    assert f"### Framework versions\n\n- wit_trl: {wit_trl.__version__}\n- TRL: " in card
    assert "wit" in trainer.model.model_tags
    arguments = {"loss_type": "dft", "loss_divisor": "weights"}
    make_trainer(make_model, tokenizer, rows, config_kwargs | arguments).create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert card.endswith("\n".join([*SETTINGS, "- loss_type: dft", "- loss_divisor: weights\n"]))


def test_model_card_names_no_model_that_is_not_known(rows, make_model, tokenizer, config_kwargs, tmp_path):
    make_trainer(make_model, tokenizer, rows, config_kwargs).create_model_card(dataset_name="data")
    card = (tmp_path / "README.md").read_text()
    assert "This model was fine-tuned on the [data]" in card
    assert "None](" not in card
