import doctest
import json
import re
from pathlib import Path

import wit_trl.data_collator

from .training import make_trainer


README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_rows_in_the_readme_train_with_their_weights(make_model, tokenizer, config_kwargs):
    (lines,) = re.findall(r"```json lines\n(.*?)```", README, flags=re.DOTALL)
    weights = []
    for line in lines.splitlines():
        trainer = make_trainer(make_model, tokenizer, [json.loads(line)], config_kwargs)
        weights.append(trainer.train_dataset[0]["token_weights"])
    assert [set(row) for row in weights[:2]] == [{0.5}, {0.5, 1}]
    assert len(weights[2]) == 3


def test_python_in_the_readme_prints_what_it_says(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.split() == re.findall(r"print.*# ([\d.]+)", code) == ["2.763"]


def test_example_of_the_collator():
    module = wit_trl.data_collator
    test = doctest.DocTestFinder(recurse=False).find(module.DataCollatorForWIT, globs={})[0]
    # The closing fence of the Markdown block is no output
    test.examples = doctest.DocTestParser().get_examples(test.docstring.replace("```", ""))
    assert doctest.DocTestRunner().run(test) == (0, len(test.examples))
    assert test.examples
