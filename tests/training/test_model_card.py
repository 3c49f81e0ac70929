"""What the model card says."""

from ..helpers import make_trainer


def test_model_card_cites_the_paper(rows, make_model, tokenizer, config_kwargs, tmp_path):
    trainer = make_trainer(make_model, tokenizer, rows, config_kwargs)
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert "On the Effect of Instruction Tuning Loss on Generalization" in card
    assert "huggingface.co/papers/2507.07817" in card
    assert "@article{chatterjee2025effect" in card
    assert "- wit\n" in card
    assert card.endswith("prompt_loss_weight: 0.2, completion_loss_weight: 0.8\n")
    assert "wit" in trainer.model.model_tags
    make_trainer(make_model, tokenizer, rows, config_kwargs | {"loss_type": "dft"}).create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert card.endswith("prompt_loss_weight: 0.2, completion_loss_weight: 0.8, loss_type: dft\n")
