"""The aliases of a whole fleet, read often and cheaply; nothing is written."""

from __future__ import annotations

from trace_ray.errors import RegistryError
from trace_ray.runtime.mlflow_client import open_client, require_answer, sqlite_file, told


class FleetAliases:
    """Reader of one MLflow server or sqlite file."""

    def __init__(self, uri: str, prefix: str) -> None:
        """Take the address as a ``Registry`` has it; nothing is opened yet.

        Args:
            uri: MLflow tracking and registry address.
            prefix: registered models are called ``<prefix>-<model name>``.
        """
        self.uri, self.prefix = uri, prefix
        self._file = sqlite_file(uri)

    def read(self) -> dict[str, dict[str, int]]:
        """Return by registered model (its full name) alias -> version: one search for all of them.

        Raises:
            RegistryError: MLflow can't be read.
        """
        if self._file is None:
            require_answer(self.uri)  # MLflow's own client would try for minutes
        elif not self._file.exists():  # an open connection would go on with the deleted file
            raise RegistryError(f"{self.uri}: the file is gone")
        found: dict[str, dict[str, int]] = {}
        token = None
        with told(self.uri, "aliases can't be read"):
            client = open_client(self.uri)
            while True:
                named = f"name LIKE '{self.prefix}-%'"
                page = client.search_registered_models(named, page_token=token)
                for model in page:
                    aliases = model.aliases.items()
                    found[model.name] = {alias: int(version) for alias, version in aliases}
                token = page.token
                if not token:
                    return found
