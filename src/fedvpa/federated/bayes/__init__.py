"""Bayes under the federated mixture prior (M9): one gradient per client per round, a population
step, and an order and a width that are chosen by targets whose content nobody has seen.

| module | what |
|---|---|
| `models` | what is trained side by side while the structure is searched |
| `messages` | what clients answer |
| `clients` | the clients' side |
| `start` | where training starts |
| `choice` | which structure and width, and whether z does anything |
| `server` | the server's side |
"""
