"""Users of two opposed groups in feature space, so that the first two examples need no language
model."""

from __future__ import annotations

import torch

from fedvpa.federated.batch import ClientStore, build_store


def two_groups(clients: int = 12, pairs: int = 20, inputs: int = 8, seed: int = 0) -> ClientStore:
    """Clients whose group prefers responses along one direction, or against it.

    A pair is the difference of the features of the chosen and the rejected response, [pairs, p].
    """
    generator = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(inputs, generator=generator), dim=0)
    differences = []
    for client in range(clients):
        wanted = direction if client % 2 == 0 else -direction
        x = torch.randn(pairs, inputs, generator=generator)
        differences.append(x * (x @ wanted).sign().unsqueeze(-1))
    names = [f"user-{client}" for client in range(clients)]
    groups = [("for", "against")[client % 2] for client in range(clients)]
    return build_store(names, groups, differences, None, [torch.ones(pairs)] * clients)
