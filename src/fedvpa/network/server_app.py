"""The ServerApp, for a SuperLink that somebody else runs: it hands Flower's grid to `serve`."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedvpa.errors import BadInputError
from fedvpa.network.grid import FlowerTransport, GridPost
from fedvpa.network.link import public_pem
from fedvpa.network.serve import LOG, serve
from fedvpa.network.settings import ServerSettings, read_settings
from fedvpa.network.superlink import logged, read_keys

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation of the `server.yaml` that the run's configuration names.

    Raises:
        BadInputError: none of the SuperLink's nodes has the key of a client.
    """
    path = Path(str(context.run_config["settings"]))
    settings, folder = read_settings(path, ServerSettings), path.parent
    names = {public_pem(key, name): name for name, key in read_keys(settings, folder).items()}
    with logged(folder / "server.log", folder / settings.run / LOG):
        bound = {
            names[node.public_key]: node.node_id
            for node in grid.get_nodes()
            if node.public_key in names
        }
        if not bound:
            raise BadInputError(
                "no node of this SuperLink has the key of a client (keys/*.pub); register them with"
                " `flwr supernode register`, and start the clients first"
            )
        serve(path, FlowerTransport(GridPost(grid), settings), bound)
