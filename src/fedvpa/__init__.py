"""fedvpa: federated variational preference alignment."""

__version__ = "0.1.0"
