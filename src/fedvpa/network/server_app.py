"""The ServerApp: thin. It hands Flower's grid to `serve`."""

from __future__ import annotations

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedvpa.network.grid import GridTransport
from fedvpa.network.serve import LOG, serve
from fedvpa.network.settings import ServerSettings, read_settings

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation of the `server.yaml` that the run's configuration names."""
    path = Path(str(context.run_config["settings"]))
    settings = read_settings(path, ServerSettings)
    log = path.parent / settings.run / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    ours, handler = logging.getLogger("fedvpa"), logging.FileHandler(log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)
    serve(path, GridTransport(grid, settings), str(context.run_config["attempt"]))
