"""What computes the loss of an LM head and its gradient. `wit_trl.loss` chooses."""
