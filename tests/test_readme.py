"""The README's first program runs as it is printed, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_first_program_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert float(scope["loss"]) < 1.6  # type: ignore[arg-type]
    assert scope["A"].shape == (21, 21)  # type: ignore[attr-defined]
    assert "100.0 %" in capsys.readouterr().out


def test_paths_methods_and_verbs_exist():
    from fxcurv.cli.main import app
    from fxcurv.methods import PUBLISHED

    for path in re.findall(r"`?((?:examples|passes|kernels|cli|fxcurv)/[\w/]*(?:\.py)?)`?", README):
        assert (ROOT / path).exists() or path.startswith(("kernels/", "fxcurv/")), path
    table = README[README.index("## Methods") : README.index("## Look inside")]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named == set(PUBLISHED)
    import typer

    verbs = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"^fxcurv (\w+)", README, re.MULTILINE)) <= verbs
