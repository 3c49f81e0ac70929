"""Whether a weight on the prompt is worth a try, on data such as this. docs/choosing-weights.md has what is known."""

from .weight_report import WeightReport


# Completion tokens to a prompt token. The literature found an effect at 0.08, none at 3.3, and has nothing between
SHORT, LONG = 1, 3
FEW_ROWS = 15_000  # the sets on which an effect was found had up to 13,500

NO_PROMPT = (
    "There is no prompt to weight.",
    "No weight on the prompt changes anything. With `messages` or `prompt` and `completion`, one would.",
)
REPEATED = (
    "Completions shorter than prompts; few rows, or several epochs",
    "A weight on the prompt is worth a try. Expect less forgetting elsewhere, not a lower loss on data such as this. "
    "Compare the ratios 0, 0.25 and 1 on what must not be forgotten.",
)
SEEN_ONCE = (
    "Completions shorter than prompts; many rows, one epoch",
    "A weight on the prompt may help: there is little evidence on so many rows. Compare the ratios 0 and 0.25.",
)
BETWEEN = (
    "Completions up to 3 times as long as prompts",
    "The evidence is thin. Take the default, or compare the ratios 0 and 0.25 if it costs little.",
)
LONG_COMPLETIONS = (
    "Completions more than 3 times as long as prompts",
    "No effect of the prompt's weight was found on such data. Take the default or 0, and spend the time elsewhere.",
)
DECISIONS = (NO_PROMPT, REPEATED, SEEN_ONCE, BETWEEN, LONG_COMPLETIONS)


def advise(report: WeightReport, epochs: float) -> str:
    """Returns the row of `DECISIONS` that a training set falls in, as a sentence: a judgement, not a measurement."""
    prompt, completion = report.tokens[0], report.tokens[1]
    if not prompt:
        data, judgement = NO_PROMPT
    elif completion > LONG * prompt:
        data, judgement = LONG_COMPLETIONS
    elif completion >= SHORT * prompt:
        data, judgement = BETWEEN
    elif epochs > 1 or (report.rows <= FEW_ROWS and not report.partial):
        data, judgement = REPEATED
    else:
        data, judgement = SEEN_ONCE
    return f"Which weights? {data.rstrip('.')}. {judgement} This is a judgement: docs/choosing-weights.md says on what."
