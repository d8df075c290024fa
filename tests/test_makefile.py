import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SENTENCE = "apt-get install python3-venv"

# As Debian's is without python3-venv.
WITHOUT_ENSUREPIP = f"""#!/bin/sh
[ "$2" = "import ensurepip" ] && exit 1
exec {sys.executable} "$@"
"""
# It makes half an environment before it fails.
WITHOUT_ROOM = f"""#!/bin/sh
[ "$2" = venv ] || exec {sys.executable} "$@"
mkdir -p .venv/bin && touch .venv/bin/python && echo "No space left" && exit 1
"""


def make_environment(folder: Path, script: str) -> "subprocess.CompletedProcess[str]":
    python = folder / "python"
    python.write_text(script)
    python.chmod(0o755)
    command = ["make", "-f", str(ROOT / "Makefile"), f"PYTHON={python}", ".venv/bin/python"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("script", "said"), [(WITHOUT_ENSUREPIP, SENTENCE), (WITHOUT_ROOM, "No space left")]
)
def test_an_environment_that_could_not_be_made_says_why_and_is_made_anew_the_next_time(
    script: str, said: str, tmp_path: Path
) -> None:
    for _ in range(2):
        made = make_environment(tmp_path, script)
        assert made.returncode == 2
        assert said in made.stdout
        assert (SENTENCE in made.stdout) == (said == SENTENCE)
    assert not (tmp_path / ".venv").exists()


def test_an_environment_whose_python_is_gone_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("python", "python3"):
        (tmp_path / ".venv" / "bin" / name).symlink_to("/nonexistent/python3")
    made = make_environment(tmp_path, f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    assert made.returncode == 0, made.stderr
    assert (tmp_path / ".venv" / "bin" / "python").exists()


def test_make_alone_tells_of_each_target_in_a_line_and_starts_nothing(tmp_path: Path) -> None:
    makefile = ROOT / "Makefile"
    # `make test` has it say by itself that it is within another.
    command = ["make", "--no-print-directory", "-f", str(makefile)]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^\.PHONY: (.*)$", makefile.read_text(), re.MULTILINE)[0].split()
    assert sorted(re.findall(r"^make (\S+)  +\S.*$", told, re.MULTILINE)) == sorted(targets)
    assert told.count("\n") == len(targets)
    assert list(tmp_path.iterdir()) == []
