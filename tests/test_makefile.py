import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

# A Python of a Debian without python3-venv: it makes half an environment before it fails.
WITHOUT_ENSUREPIP = f"""#!/bin/sh
[ "$2" = venv ] || exec {sys.executable} "$@"
mkdir -p "$3/bin" && touch "$3/bin/python" && exit 1
"""


def test_an_environment_that_could_not_be_made_is_made_anew_the_next_time(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(WITHOUT_ENSUREPIP)
    python.chmod(0o755)
    command = ["make", "-f", str(ROOT / "Makefile"), f"PYTHON={python}", ".venv/bin/python"]
    for _ in range(2):
        made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert made.returncode == 2
        assert "apt-get install python3-venv" in made.stdout
    assert not (tmp_path / ".venv").exists()


def test_make_alone_tells_of_each_target_in_a_line_and_starts_nothing(tmp_path: Path) -> None:
    makefile = ROOT / "Makefile"
    # `make test` has it say by itself that it is within another.
    command = ["make", "--no-print-directory", "-f", str(makefile)]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^\.PHONY: (.*)$", makefile.read_text(), re.MULTILINE)[0].split()
    assert sorted(re.findall(r"^make (\S+)  +\S.*$", told, re.MULTILINE)) == sorted(targets)
    assert told.count("\n") == len(targets)
    assert list(tmp_path.iterdir()) == []
