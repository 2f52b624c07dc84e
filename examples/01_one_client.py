"""One client's episode: what a client does with its comparisons, step by step.

python examples/01_one_client.py
"""

from __future__ import annotations

import torch
from toy import two_groups

from fedvpa.federated.episodes import Episodes, local_draws
from fedvpa.federated.local import LocalSettings, stack, train_locally
from fedvpa.federated.objective import RoundContext, VariationalObjective
from fedvpa.federated.priors.gaussian import GaussianPrior
from fedvpa.functional.preference import mean_choice_loss
from fedvpa.selector.encoder import Encoder
from fedvpa.selector.heads.bilinear import BilinearHead
from fedvpa.selector.selector import Selector

# 1. One client's pairs [1, 20 pairs, 8 features], each a difference h(chosen) - h(rejected).
store = two_groups(clients=1)
pairs = store.batch([0])
print(f"{store.names[0]}: differences of {tuple(pairs.difference.shape)}")

# 2. The selector: an encoder q(z | context), and a reward that z steers. Parameters are a dict.
selector = Selector(Encoder(inputs=8, latent=4, hidden=()), BilinearHead(inputs=8, latent=4))
params = selector.init(torch.Generator().manual_seed(0))
print("parameters:", {name: tuple(value.shape) for name, value in params.items()})

# 3. An episode: the pairs are split into a context, which z is inferred from, and targets, which
#    are predicted. No pair is both, so that no label is read before it is scored.
draws = local_draws(0, 0, store.names, store.sizes, steps=1)
episode = Episodes(pairs, draws.order, batch_size=0, context_share=0.7)[0]
print(f"context: {int(episode.context.sum())} pairs, targets: {int(episode.target.sum())}")

# 4. Before training, z says next to nothing, and the targets are predicted like a coin.
posterior = selector.posterior(params, episode.pairs, episode.context)
margin = selector.margin(params, posterior.mean, episode.pairs)
loss = mean_choice_loss(margin, episode.target.float())
print(f"before: {float(loss):.3f} nats per target pair (a coin: {torch.tensor(2.0).log():.3f})")

# 5. A local round: 30 steps of Adam on L = reconstruction + beta KL, a fresh episode per step.
#    The same function trains one client or a thousand, stacked along the first axis.
none = torch.full((1,), -1)
context = RoundContext(None, None, None, none, none, kl_weight=0.002, pull_weight=0.0)
objective = VariationalObjective(selector, GaussianPrior())
settings = LocalSettings(seed=0, steps=30, learning_rate=0.02)
result = train_locally(
    objective.given(context), stack(params, 1), pairs, store.names, 0, settings
)  # fmt: skip
trained = {name: value[0] for name, value in result.params.items()}
print("mean over the steps:", {name: round(float(v), 3) for name, v in result.losses.items()})

# 6. After it, the same context gives a z under which the targets are predicted. What a client sends
#    to the server is the change of its parameters, never a pair.
posterior = selector.posterior(trained, episode.pairs, episode.context)
after = mean_choice_loss(
    selector.margin(trained, posterior.mean, episode.pairs), episode.target.float()
)
print(f"after: {float(after):.3f} nats per target pair")
