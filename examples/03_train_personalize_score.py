"""Train, personalise and score from Python: what an application does.

python examples/03_train_personalize_score.py [FOLDER]
"""

from __future__ import annotations

import sys
import tempfile

from fedvpa import PreferenceModel, evaluate, train

folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()

# 1. A federation of 16 built-in users with two opposed preferences, simulated in this process.
#    `data` may be a file, a folder, a list of records, or a datasets.Dataset as well.
run = train(
    "personas", f"{folder}/run", clients=16, pairs=8, rounds=20, backbone="minilm", layer=0,
    progress=False,
)  # fmt: skip
print(f"{run.root.name}: {len(run.history)} rounds, {run.seconds:.0f} s")

# 2. Users whom nobody has trained on: a z from eight pairs, scored on others.
found = evaluate(run, clients=8, context=8, progress=False).results["accuracy"]
for key in ("own", "prior_mean", "other_group"):
    print(f"accuracy, {key}: {found[key]['mean']:.2f}")

# 3. A new user makes four choices, always the longer reply; no training follows.
short = "Rinse it first."
long = "Rinse it first, then let it stand for ten minutes before you boil it."
questions = ("How do I cook rice?", "How do I cook lentils?", "How do I cook oats?", "And barley?")
choices = [{"prompt": q, "chosen": long, "rejected": short} for q in questions]
model = PreferenceModel(run)
me = model.personalize(choices)
print(f"|z| = {float(me.mean.norm()):.2f}, surprise {me.surprise:.2f} nats per pair")

# 4. Rewards of responses under that z, and under the z of somebody of whom nothing is known.
replies = [("How do I cook beans?", short), ("How do I cook beans?", long)]
print("mine:   ", [round(x, 2) for x in model.score(replies, me).tolist()])
print("neutral:", [round(x, 2) for x in model.score(replies, model.neutral).tolist()])
