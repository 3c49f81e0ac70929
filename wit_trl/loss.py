import torch
import torch.nn.functional as F


def wit_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    r"""
    Returns the WIT loss of a batch, a scalar in nats. Reference form, for any training loop: it needs the full logits,
    which [`WITSFTTrainer`] never builds.

    $$\mathcal{L} = -\frac{1}{N} \sum_{t \,:\, \text{label}_t \neq -100} w_t \log p(x_t \mid x_{<t})$$

    with \\( w_t \\) the weight of token \\( t \\) as a target and \\( N \\) the *number* of tokens with a label, not
    the sum of their weights ([paper](https://huggingface.co/papers/2507.07817)). Labels and weights are aligned with
    `input_ids`, as [`DataCollatorForWIT`] returns them: the shift happens in here, and the first token of a row, which
    nothing predicts, is in neither sum.

    Args:
        logits (`torch.Tensor` of shape `(B, T, V)`):
            Output of the language model.
        labels (`torch.Tensor` of shape `(B, T)`):
            Token ids, -100 where a token is no target.
        token_weights (`torch.Tensor` of shape `(B, T)`):
            Weight of each token as a target.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            Divisor \\( N \\): the number of targets of the whole optimizer step, over all micro-batches and ranks.
            Defaults to the number of targets in this batch. A batch without any gives a differentiable zero.
    """
    labels, token_weights = labels[:, 1:], token_weights[:, 1:]  # (B, T - 1)
    if num_items_in_batch is None:
        num_items_in_batch = (labels != -100).sum()
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    per_token_loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")  # (B, T - 1)
    return (per_token_loss * token_weights).sum() / torch.as_tensor(num_items_in_batch).clamp(min=1)
