"""The Python in README.md runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_lines_of_python_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    for block in blocks:
        exec(block, names)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("(4, 64, 32)")
    losses = [float(line) for line in shown[-3:]]
    assert losses[2] < losses[0]
