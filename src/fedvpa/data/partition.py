"""From pairs to clients: natural ids, by group at any ratio, Dirichlet, mixed preferences, and the
mirrored protocol.

Flower Datasets' partitioners would serve for the Dirichlet case alone and need an older `datasets`;
the few lines are here.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedvpa.config import MADE
from fedvpa.data.content import Policy, contents, groups_apart
from fedvpa.data.reading import FEW
from fedvpa.errors import BadInputError
from fedvpa.records import PreferencePair

MIRRORED = "-mirrored"
"""Ending of the name of a client that holds another one's pairs with reversed labels."""

Partition = Literal["auto", "natural", "group", "dirichlet", "mixed"]


@dataclass(frozen=True)
class ClientPairs:
    """One client's private pairs; `group` is the true group, for evaluation alone."""

    name: str
    group: str | None
    pairs: tuple[PreferencePair, ...]
    corrupted: bool = False


@dataclass(frozen=True)
class Partitioner:
    """How pairs are divided; see `data.*` in the configuration. `clients` 0 stands for every client
    id, or for `otherwise` clients where there are no ids."""

    clients: int = 0
    partition: Partition = "auto"
    group_ratio: str | None = None
    dirichlet_alpha: float = 0.5
    mixing: float = 0.2
    protocol: Literal["natural", "mirrored"] = "natural"
    max_pairs: int = 0
    least_pairs: int = 2
    otherwise: int = MADE

    def __call__(
        self, pairs: Sequence[PreferencePair], seed: int, prefix: str = "client"
    ) -> list[ClientPairs]:
        """Divide `pairs`. No pair goes to two clients (but for `mirrored`, where its reversal
        does), none is kept twice.

        Raises:
            BadInputError: ids, groups or pairs do not suffice; the message says how many there are.
        """
        generator = np.random.default_rng([seed, *prefix.encode()])
        clients = (
            self._mirrored(pairs, generator, prefix)
            if self.protocol == "mirrored"
            else self._divide(pairs, generator, prefix, self.clients or self.otherwise)
        )
        out = []
        for client in clients:
            own = without_duplicates(client.pairs)
            if self.max_pairs:
                own = own[: self.max_pairs]
            if len(own) < self.least_pairs:
                raise BadInputError(
                    f"{client.name} would hold {len(own)} pair{'s' * (len(own) != 1)}, but needs at"
                    f" least {self.least_pairs} (context and target): {len(pairs)} pairs for"
                    f" {len(clients)} clients; use fewer clients"
                )
            out.append(replace(client, pairs=tuple(own)))
        return out

    def kind(self, pairs: Sequence[PreferencePair]) -> str:
        """How these pairs are divided: by their ids, if nearly all have one and nothing else was
        asked for.

        Raises:
            BadInputError: some have an id, and too many have none.
        """
        if self.partition not in ("auto", "natural"):
            return self.partition
        without = [p for p in pairs if p.client_id is None]
        if self.partition == "auto" and len(without) == len(pairs):
            return "group"
        if without and len(without) >= FEW * len(pairs):
            raise BadInputError(
                f"{without[0].source}: has no client_id, as {len(without)} of {len(pairs)} records;"
                " give every record one, or divide pairs without regard to the ids with"
                " --partition group"
            )
        return "natural"

    def told(
        self, pairs: Sequence[PreferencePair], clients: Sequence[ClientPairs]
    ) -> tuple[str, ...]:
        """What was asked for and what there is, where they differ."""
        if self.protocol == "mirrored" or self.kind(pairs) != "natural":
            return ()
        there = _by_id(pairs)
        without = len(pairs) - sum(map(len, there.values()))
        able = len(there) - len(self.too_few(pairs))
        notes = []
        if len(there) > able:
            notes.append(
                f"{len(there) - able} of {len(there)} client ids have fewer than"
                f" {self.least_pairs} pairs, and are left out"
            )
        if self.clients > able:
            notes.append(f"{self.clients} clients were asked for; the data have {able}")
        elif len(clients) < able:
            notes.append(f"{len(clients)} of {able} clients are used, as was asked for")
        if without:
            notes.append(f"{without} record{'s' * (without != 1)} left out, without a client_id")
        return tuple(notes)

    def too_few(self, pairs: Sequence[PreferencePair]) -> set[str]:
        """Ids with fewer pairs than a client needs."""
        return {
            name
            for name, own in _by_id(pairs).items()
            if len(without_duplicates(own)) < self.least_pairs
        }

    def _divide(
        self,
        pairs: Sequence[PreferencePair],
        generator: np.random.Generator,
        prefix: str,
        count: int,
    ) -> list[ClientPairs]:
        kind = self.kind(pairs)
        if kind == "natural":
            return self._natural(pairs, generator, count)
        pools = _pools(pairs, generator)
        if kind == "dirichlet":
            return self._dirichlet(pools, generator, prefix, count)
        owners = self._owners(sorted(pools), count)
        share = min(len(pools[g]) // owners.count(g) for g in pools) if self.group_ratio else None
        dealt: list[list[PreferencePair]] = [[] for _ in owners]
        for group, pool in pools.items():
            holders = [i for i, g in enumerate(owners) if g == group]
            for position, pair in enumerate(pool):
                holder = holders[position % len(holders)]
                if share is None or len(dealt[holder]) < share:
                    dealt[holder].append(pair)
        if kind == "mixed" and len(pools) > 1:
            _swap_between_groups(dealt, owners, self.mixing, generator)
        return [
            ClientPairs(f"{prefix}-{i:04d}", g or None, tuple(own))
            for i, (g, own) in enumerate(zip(owners, dealt))
        ]

    def _natural(
        self, pairs: Sequence[PreferencePair], generator: np.random.Generator, count: int
    ) -> list[ClientPairs]:
        by_id = _by_id(pairs)
        small = self.too_few(pairs)
        usable = {name: own for name, own in by_id.items() if name not in small}
        if not usable:
            raise BadInputError(
                f"none of the {len(by_id)} client ids has {self.least_pairs} or more pairs"
            )
        names = sorted(usable)
        if self.clients:
            names = sorted(generator.permutation(names)[:count].tolist())
        return [
            ClientPairs(name, _majority_group(usable[name]), tuple(usable[name])) for name in names
        ]

    def _owners(self, groups: list[str], count: int) -> list[str]:
        """Group of every client, groups interleaved; each group gets at least one."""
        if count < len(groups):
            raise BadInputError(
                f"{count} clients are too few for {len(groups)} groups ({', '.join(groups)})"
            )
        shares = [1.0] * len(groups)
        if self.group_ratio:
            try:
                shares = [float(x) for x in self.group_ratio.split(":")]
            except ValueError:
                shares = []
            if len(shares) != len(groups) or min(shares) <= 0:
                raise BadInputError(
                    f"data.group_ratio: '{self.group_ratio}' must give a positive number for each"
                    f" of the {len(groups)} groups ({', '.join(groups)}), as in 70:30"
                )
        exact = np.array(shares) / sum(shares) * count
        counts = np.maximum(1, np.floor(exact).astype(int))
        while counts.sum() < count:
            counts[np.argmax(exact - counts)] += 1
        while counts.sum() > count:
            counts[np.argmax(counts)] -= 1
        slots = [((i + 0.5) / n, g) for g, n in zip(groups, counts) for i in range(n)]
        return [g for _, g in sorted(slots)]

    def _dirichlet(
        self,
        pools: dict[str, list[PreferencePair]],
        generator: np.random.Generator,
        prefix: str,
        count: int,
    ) -> list[ClientPairs]:
        """Each client's mixture of groups is drawn from a Dirichlet; clients are equally large (cf.
        Hsu et al., 2019)."""
        each = sum(map(len, pools.values())) // count
        left = {g: list(pool) for g, pool in pools.items()}
        groups = sorted(pools)
        clients = []
        for i in range(count):
            mixture = generator.dirichlet([self.dirichlet_alpha] * len(groups))
            own: list[PreferencePair] = []
            while len(own) < each:
                available = np.array([m if left[g] else 0.0 for g, m in zip(groups, mixture)])
                if available.sum() <= 0:
                    available = np.array([float(len(left[g])) for g in groups])
                own.append(
                    left[groups[generator.choice(len(groups), p=available / available.sum())]].pop()
                )
            clients.append(ClientPairs(f"{prefix}-{i:04d}", _majority_group(own), tuple(own)))
        return clients

    def _mirrored(
        self, pairs: Sequence[PreferencePair], generator: np.random.Generator, prefix: str
    ) -> list[ClientPairs]:
        count = self.clients or self.otherwise
        if count < 2 or count % 2:
            raise BadInputError(f"protocol=mirrored needs an even number of clients, not {count}")
        return [
            side
            for client in self._divide(pairs, generator, prefix, count // 2)
            for side in (replace(client, group=client.group or "original"), mirror_image(client))
        ]


def mirror_image(client: ClientPairs) -> ClientPairs:
    """The client of opposite taste: the same pairs with every label reversed, in a group of
    their own."""
    group = "mirrored" if client.group in (None, "original") else f"{client.group}{MIRRORED}"
    return ClientPairs(f"{client.name}{MIRRORED}", group, tuple(p.reversed() for p in client.pairs))


def corrupt(
    clients: Sequence[ClientPairs], share: float, kind: Literal["random", "reversed"], seed: int
) -> list[ClientPairs]:
    """Spoil the labels of a share of the clients, drawn at random: all of them reversed, or each by
    the toss of a coin."""
    generator = np.random.default_rng([seed, 23])
    spoilt = set(generator.permutation(len(clients))[: round(share * len(clients))].tolist())
    out = []
    for i, client in enumerate(clients):
        if i in spoilt:
            flip = generator.random(len(client.pairs)) < (1.0 if kind == "reversed" else 0.5)
            pairs = tuple(p.reversed() if f else p for p, f in zip(client.pairs, flip))
            client = replace(client, pairs=pairs, corrupted=True)
        out.append(client)
    return out


def _by_id(pairs: Sequence[PreferencePair]) -> dict[str, list[PreferencePair]]:
    """The pairs of every client id; those without an id are in none."""
    out: dict[str, list[PreferencePair]] = defaultdict(list)
    for pair in pairs:
        if pair.client_id is not None:
            out[pair.client_id].append(pair)
    return dict(out)


def without_duplicates(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Keep the first of pairs with equal prompt and responses, whatever their labels: a target
    never sits in the context."""
    return list({pair.content_key(): pair for pair in reversed(pairs)}.values())[::-1]


def split_off(
    client: ClientPairs, share: float, seed: int, content: Policy = "repeated"
) -> tuple[ClientPairs, ClientPairs]:
    """Divide a client's pairs at random: the larger part, and `share` of them (one at least if
    there are five or more). Under ``content: new`` no response of the one part is in the other, nor
    a prompt where it can be helped: whole groups of pairs go to a part, as far as they fit."""
    count = len(client.pairs)
    held = round(share * count)
    if share > 0 and held == 0 and count >= 5:
        held = 1
    held = min(held, count - 2)
    # a mirrored pair of clients holds the same pairs out
    owner = client.name.removesuffix(MIRRORED)
    name = int.from_bytes(hashlib.sha256(owner.encode()).digest()[:8], "big")
    order = np.random.default_rng([seed, name]).permutation(count)
    if content == "new" and held > 0:
        order = _grouped(order, held, groups_apart(contents(client.pairs)))
        held = int(order[0])
        order = order[1:]
    parts = (sorted(order[held:].tolist()), sorted(order[:held].tolist()))
    first, second = (tuple(client.pairs[i] for i in index) for index in parts)
    return replace(client, pairs=first), replace(client, pairs=second)


def _grouped(order: NDArray[np.int64], held: int, group: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many pairs are held out, and the order with these first: whole groups in the given order,
    as long as they fit into `held`."""
    taken = list[int]()
    for g in dict.fromkeys(group[order].tolist()):
        members = order[group[order] == g].tolist()
        if len(taken) + len(members) <= held:
            taken += members
    rest = [i for i in order.tolist() if i not in set(taken)]
    return np.array([len(taken), *taken, *rest], dtype=np.int64)


def _pools(
    pairs: Sequence[PreferencePair], generator: np.random.Generator
) -> dict[str, list[PreferencePair]]:
    """Shuffled pairs of every group, without repetitions within a group (two groups may well
    judge the same pair); without groups all are in one, called ''."""
    named = [p.group is not None for p in pairs]
    if any(named) and not all(named):
        stray = pairs[named.index(False)]
        raise BadInputError(f"{stray.source}: has no group although other records have one")
    pools: dict[str, list[PreferencePair]] = defaultdict(list)
    for pair in pairs:
        pools[pair.group or ""].append(pair)
    distinct = {g: without_duplicates(pools[g]) for g in sorted(pools)}
    return {g: [pool[i] for i in generator.permutation(len(pool))] for g, pool in distinct.items()}


def _majority_group(pairs: Sequence[PreferencePair]) -> str | None:
    counts: dict[str, int] = defaultdict(int)
    for pair in pairs:
        if pair.group is not None:
            counts[pair.group] += 1
    return max(sorted(counts), key=lambda g: counts[g]) if counts else None


def _swap_between_groups(
    dealt: list[list[PreferencePair]],
    owners: list[str],
    share: float,
    generator: np.random.Generator,
) -> None:
    """Exchange `share` of every client's pairs with clients of other groups, in place."""
    gifts: list[tuple[str, PreferencePair]] = []
    room: list[int] = []
    for i, own in enumerate(dealt):
        for _ in range(round(share * len(own))):
            gifts.append((owners[i], own.pop()))
            room.append(i)
    generator.shuffle(room)
    for i in room:
        foreign = next((k for k, (group, _) in enumerate(gifts) if group != owners[i]), 0)
        dealt[i].append(gifts.pop(foreign)[1])
