import doctest
import re
from pathlib import Path

import wit_trl.data_collator


def test_python_in_the_readme_prints_what_it_says(capsys):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.split() == re.findall(r"print.*# ([\d.]+)", code) == ["2.763"]


def test_example_of_the_collator():
    module = wit_trl.data_collator
    test = doctest.DocTestFinder(recurse=False).find(module.DataCollatorForWIT, globs={})[0]
    # The closing fence of the Markdown block is no output
    test.examples = doctest.DocTestParser().get_examples(test.docstring.replace("```", ""))
    assert doctest.DocTestRunner().run(test) == (0, len(test.examples))
    assert test.examples
