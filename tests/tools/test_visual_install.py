"""Pages are tested where a browser is: the script that brings it, what happens without, and the README's commands."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import browser
import pytest
from visattn_tools import visualization

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text().split("\n### See what it looks at\n")[1].split("\n## ")[0].split("\n### ")[0]


def install(folder: Path, *present: str, user: int = 0) -> tuple[int, str, list[str]]:
    """Run the script where only `present` is on the PATH: exit code, messages, and what apt-get was asked for."""
    log = folder / "log"
    log.touch()
    fakes = dict.fromkeys(present, "exit 0")
    fakes |= {"id": f"echo {user}", "apt-get": f'echo "$@" >> {log}'}
    for name, body in fakes.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    bash = shutil.which("bash")
    assert bash is not None
    script = [bash, "tools/install_browser.sh"]
    environment = {"PATH": str(folder)}
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr, log.read_text().splitlines()


def test_a_browser_that_is_there_is_left_alone(tmp_path: Path) -> None:
    assert install(tmp_path, "chromium", "chromedriver") == (0, "", [])


def test_root_installs_what_is_missing(tmp_path: Path) -> None:
    code, message, asked = install(tmp_path, "chromium")
    assert (code, message) == (0, "")
    assert [line.split()[0] for line in asked] == ["update", "install"]
    assert {"chromium", "chromium-driver"} <= set(asked[1].split())


def test_others_are_told(tmp_path: Path) -> None:
    code, message, asked = install(tmp_path, user=1000)
    assert (code, asked) == (1, [])
    assert message.startswith("no chromium chromedriver on the PATH")
    assert "Remedy: on Debian, apt-get install chromium chromium-driver" in message


@pytest.mark.parametrize("ci", ["true", ""])
def test_without_a_browser_only_ci_fails(ci: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(browser.shutil, "which", lambda name: None)
    outcome = pytest.fail.Exception if ci else pytest.skip.Exception
    with pytest.raises(outcome, match=r"no chromium, no chromedriver: tools/install_browser\.sh, as root"):
        next(browser.browse())


def test_commands_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their flags go together; what they write is tested elsewhere."""
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```bash\n(.*?)```", SECTION, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [
        words[2:] for words in (shlex.split(line, comments=True) for line in lines) if "tools/visualize.py" in words
    ]
    assert len(commands) >= 3
    for words in commands:
        args = visualization.visualize_parser().parse(words)
        visualization._check(args)
        assert str(args.checkpoint or "") in ("", "runs/quickstart")
        assert all(Path(image).parent == Path("runs/quickstart") or os.sep not in image for image in args.images)


def test_the_figure_of_the_readme() -> None:
    (name,) = re.findall(r"!\[[^\]]+\]\((model_cards/images/[^)]+)\)", SECTION)
    assert (ROOT / name).stat().st_size <= 150_000
