"""The loss of the paper as plain loops, independent of the package, and tokens with their region."""

import math
import operator

import torch


def tokenize(tokenizer, row):
    """The tokens of a prompt/completion row as TRL makes them, with the mask of the completion."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    input_ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
    assert input_ids[: len(prompt)] == prompt
    return {"input_ids": input_ids, "completion_mask": [0] * len(prompt) + [1] * (len(input_ids) - len(prompt))}


def region_sums(model, rows):
    """Negative log-likelihoods (differentiable) and token counts of both regions, one unpadded row at a time."""
    sums, counts = [0.0, 0.0], [0, 0]
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0]
        for t in range(1, len(row["input_ids"])):
            region = row["completion_mask"][t]
            sums[region] = sums[region] - torch.log_softmax(logits[t - 1], dim=0)[row["input_ids"][t]]
            counts[region] += 1
    return sums, counts


def formula(model, rows, weights):
    """The loss of an optimizer step over `rows`, and the unweighted loss of both regions."""
    sums, counts = region_sums(model, rows)
    count = sum(n for n, weight in zip(counts, weights, strict=True) if weight != 0)
    return sum(weight * s for weight, s in zip(weights, sums, strict=True)) / count, [
        s.item() / n for s, n in zip(sums, counts, strict=True)
    ]


def formula_with_data_weights(model, rows, weights, factors=lambda nll, entropy: 1, divisor="count"):
    """
    The loss of an optimizer step over `rows` that bring weights of their own, `weight` and `token_weights`, with a
    factor for each token.
    """
    total, count = 0.0, 0
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0]
        for t in range(1, len(row["input_ids"])):
            weight = weights[row["completion_mask"][t]] * row.get("weight", 1)
            if "token_weights" in row:
                weight *= row["token_weights"][t]
            if weight != 0:
                log_probs = torch.log_softmax(logits[t - 1], dim=0)
                nll, entropy = -log_probs[row["input_ids"][t]], -(log_probs.exp() * log_probs).sum()
                total = total + weight * factors(nll.detach(), entropy.detach()) * nll
                count += 1 if divisor == "count" else weight
    return total / count


def accuracy_by_region(model, rows):
    """Share of top-1 predictions among the tokens of each region."""
    hits = ([], [])
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0]
        for t in range(1, len(row["input_ids"])):
            hits[row["completion_mask"][t]].append(int(logits[t - 1].argmax()) == row["input_ids"][t])
    return [sum(of_region) / len(of_region) for of_region in hits]


def token_metrics(model, rows, weights):
    """Mean entropy in nats, and share of top-1 predictions, of the tokens whose weight is not zero."""
    entropies, hits = [], []
    for row in rows:
        probabilities = torch.softmax(model(torch.tensor([row["input_ids"]])).logits[0].detach(), dim=1)
        for t in range(1, len(row["input_ids"])):
            if weights[row["completion_mask"][t]] != 0:
                entropies.append(-(probabilities[t - 1] * probabilities[t - 1].log()).sum().item())
                hits.append(int(probabilities[t - 1].argmax()) == row["input_ids"][t])
    return sum(entropies) / len(entropies), sum(hits) / len(hits)


def head_in_float64(inputs, targets, weights):
    """The weighted sum, and the nll and entropy of each target, of hidden states under a head with a bias."""
    hidden_states, weight, bias = (x.tolist() for x in inputs)
    result = {"loss": 0.0, "nll": [], "entropy": []}
    for hidden, target, token_weight in zip(hidden_states, targets.tolist(), weights.tolist(), strict=True):
        logits = [sum(map(operator.mul, hidden, row)) + b for row, b in zip(weight, bias, strict=True)]
        log_normaliser = math.log(sum(math.exp(z) for z in logits))
        nll = log_normaliser - logits[target]
        log_probs = [z - log_normaliser for z in logits if z > -math.inf]
        result["nll"].append(nll)
        result["entropy"].append(-sum(math.exp(log_p) * log_p for log_p in log_probs))
        result["loss"] += token_weight * nll if token_weight else 0
    return result
