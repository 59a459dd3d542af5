"""One tree of picklable errors. Each message says what is wrong, where, and what to do.

    TraceRayError
    ├── ConfigError      a config or policy file, or a command's argument (all problems at once)
    ├── DataError        preference data or labels
    ├── ModelError       a model reference, a checkpoint or an adapter
    ├── JudgeError       a judge that can't be built or isn't good enough
    ├── TrainError       training stopped without a usable adapter
    ├── RegistryError    MLflow
    ├── ServeError       the endpoint
    ├── RolloutError     a promotion or rollback that is refused or can't go on
    ├── AuditError       the audit chain is broken or can't be written
    └── StateError       the fleet is held by somebody else, or its state can't be read
        └── StoppedError     somebody asked the run to stop

The first three are the user's to mend; the CLI prints any of the tree without a traceback and
exits with status 2.
"""

from __future__ import annotations


class TraceRayError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(TraceRayError, ValueError):
    """Problems in a file, one line each, ready to print: ``file: path: message``."""


class DataError(TraceRayError, ValueError):
    """Preference data, labels or prompts that can't be used."""


class ModelError(TraceRayError, ValueError):
    """A model reference, checkpoint or adapter that can't be used."""


class JudgeError(TraceRayError, RuntimeError):
    """A judge that can't be built, or that isn't good enough to triage."""


class TrainError(TraceRayError, RuntimeError):
    """Training that ended without a usable adapter."""


class RegistryError(TraceRayError, RuntimeError):
    """MLflow refused, or holds something other than what was registered."""


class ServeError(TraceRayError, RuntimeError):
    """The endpoint can't start or can't answer."""


class RolloutError(TraceRayError, RuntimeError):
    """A promotion or rollback that is refused, or that can't go on."""


class BusyError(RolloutError):
    """Another operator is at work."""


class AuditError(TraceRayError, RuntimeError):
    """The audit chain is broken, or can't be written."""


class StateError(TraceRayError, RuntimeError):
    """The fleet is held by somebody else, or its state can't be read."""


class StoppedError(StateError):
    """Somebody asked the run to stop; the same command goes on where it stopped."""


def problems(source: str, found: list[tuple[str, str]]) -> ConfigError:
    """Return one ConfigError listing every ``(path, message)`` found in ``source``."""
    return ConfigError(
        "\n".join(f"{source}: {path or '(top level)'}: {text}" for path, text in found)
    )
