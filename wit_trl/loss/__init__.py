"""From hidden states to the weighted loss: the public functions, the LM head, the kernels."""
