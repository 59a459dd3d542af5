"""The code's own digest."""

import shutil
import subprocess
import sys
from pathlib import Path

import trace_ray
from trace_ray.version import code_version

SHOW = "from trace_ray.version import code_version; print(code_version())"


def test_an_edited_source_is_another_code_version(tmp_path):
    package = Path(trace_ray.__file__).parent
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, tmp_path / "trace_ray", ignore=ignore)

    def copied():
        words = [sys.executable, "-B", "-c", SHOW]
        env = {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
        return done.stdout.strip()

    assert copied() == code_version()
    assert code_version().startswith(f"{trace_ray.__version__}+")
    with (tmp_path / "trace_ray" / "core" / "triage.py").open("a") as file:
        file.write("# more\n")
    assert copied().startswith(f"{trace_ray.__version__}+")
    assert copied() != code_version()
