"""Where comparisons come from, by name: built-in personas, files, or elsewhere.

| source | training clients | unseen clients | new pairs of seen clients |
|---|---|---|---|
| `personas` | generated users | other generated users | generated anew |
| `files` | by `data.partition` | not trained on | by id; dealt by group where the clients were |
| `federation` | not here | not here | not here |
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, NoReturn, Protocol, runtime_checkable

from fedvpa.config import FEDERATION, DataConfig
from fedvpa.data.partition import MIRRORED, ClientPairs, Partitioner, mirror_image
from fedvpa.data.personas import UNSEEN
from fedvpa.data.personas import personas as generate
from fedvpa.data.reading import pairs_by
from fedvpa.errors import BadInputError
from fedvpa.parts import SOURCES, builder, is_reference, part
from fedvpa.records import PreferencePair

NEW = 10
"""Unseen clients that are made where the data have no ids, and nobody says how many."""


class Clients(NamedTuple):
    """Clients with their pairs, what was skipped on reading, and what is to be said of both."""

    clients: list[ClientPairs]
    skipped: Counter[str]
    first_skipped: list[str]
    notes: tuple[str, ...] = ()


@runtime_checkable
class Source(Protocol):
    """Where clients and their comparisons come from. A builder is called with ``data=``, the data
    settings, whose `clients` says how many are wanted."""

    @property
    def generates(self) -> bool:
        """Whether new pairs for an evaluation can be had without naming other data."""
        ...

    def training(self, seed: int) -> Clients:
        """The clients to train on."""
        ...

    def unseen(self, seed: int, context: int, seen: set[str]) -> Clients:
        """Clients to evaluate on, none of them called as in `seen`, with enough pairs for `context`
        of them to be read; none, if all are in `seen`."""
        ...

    def held_out(self, seed: int, seen: Sequence[ClientPairs]) -> list[ClientPairs]:
        """New pairs for the clients that were trained on, in their order, a client that gets none
        with an empty row; or nothing, if none of the pairs are theirs."""
        ...


def source_of(data: DataConfig) -> Source:
    """The source that the settings name.

    Raises:
        BadInputError: a reference to a source that cannot be imported.
    """
    name = data.source
    known = name in SOURCES or is_reference(name)
    source: Source = builder(part("data source", SOURCES, name if known else "files"))(data=data)
    return source


@dataclass(frozen=True)
class Personas:
    """Users with known preference vectors (see `fedvpa.data.personas`)."""

    data: DataConfig
    generates: bool = True

    def training(self, seed: int) -> Clients:
        """The first `data.clients` users."""
        users = generate(self.data.personas, range(self.data.made), seed)
        return Clients(users, Counter(), [])

    def unseen(self, seed: int, context: int, seen: set[str]) -> Clients:
        """Other users, with `context` pairs and as many targets."""
        users = range(UNSEEN, UNSEEN + (self.data.clients or NEW))
        pairs = max(4, 2 * context)
        return Clients(
            generate(self.data.personas, users, seed, "test", pairs=pairs), Counter(), []
        )

    def held_out(self, seed: int, seen: Sequence[ClientPairs]) -> list[ClientPairs]:
        """Half as many new pairs as a user was given for training."""
        users = [int(client.name.split("-")[1]) for client in seen]
        pairs = max(2, self.data.personas.pairs // 2)
        return generate(self.data.personas, users, seed, "test", pairs=pairs)


@dataclass(frozen=True)
class Files:
    """Pairs of a file, a folder, or a dataset of the Hub, divided among clients."""

    data: DataConfig
    generates: bool = False

    def training(self, seed: int) -> Clients:
        """The pairs as `data.partition` divides them."""
        found = pairs_by(self.data)
        divide = self._partitioner()
        clients = divide(found.pairs, seed)
        notes = (*found.notes, *divide.told(found.pairs, clients))
        return Clients(clients, found.skipped, found.first_skipped, notes)

    def unseen(self, seed: int, context: int, seen: set[str]) -> Clients:
        """The pairs of clients that were not trained on."""
        found = pairs_by(self.data)
        new = [p for p in found.pairs if p.client_id is None or p.client_id not in seen]
        divide = replace(self._partitioner(), otherwise=NEW)
        if divide.kind(found.pairs) == "natural":
            new = [p for p in new if p.client_id is not None]
            # an id with one pair has no target beside its context
            small = divide.too_few(new)
            new = [p for p in new if p.client_id not in small]
        clients = divide(new, seed, prefix="unseen") if new else []
        notes = (*found.notes, *(divide.told(new, clients) if new else ()))
        return Clients(clients, found.skipped, found.first_skipped, notes)

    def held_out(self, seed: int, seen: Sequence[ClientPairs]) -> list[ClientPairs]:
        """The pairs that bear a client's own id. Where the clients themselves were made by group,
        pairs are dealt by group; mirrored clients get reversed pairs for their reversed halves.
        Without ids and without groups nothing is a seen client's."""
        if self.data.protocol == "mirrored":
            plain = replace(self, data=self.data.model_copy(update={"protocol": "natural"}))
            halves = [_ungrouped(c) for c in seen if not c.name.endswith(MIRRORED)]
            return [
                side
                for c in plain.held_out(seed, halves)
                for side in (replace(c, group=c.group or "original"), mirror_image(c))
            ]
        pairs = pairs_by(self.data).pairs
        if dealt_by(seen) == "id":
            own: dict[str | None, list[PreferencePair]] = defaultdict(list)
            for pair in pairs:
                own[pair.client_id].append(pair)
            out = [replace(c, pairs=tuple(own[c.name])) for c in seen]
            return out if any(c.pairs for c in out) else []
        if any(c.group is None for c in seen) or not any(p.group for p in pairs):
            return []
        out = []
        for client in seen:
            holders = [c.name for c in seen if c.group == client.group]
            pool = [p for p in pairs if p.group == client.group]
            dealt = pool[holders.index(client.name) :: len(holders)]
            out.append(replace(client, pairs=tuple(dealt)))
        return out

    def _partitioner(self) -> Partitioner:
        d = self.data
        return Partitioner(
            d.clients, d.partition, d.group_ratio, d.dirichlet_alpha, d.mixing, d.protocol,
            d.max_pairs, otherwise=d.made,
        )  # fmt: skip


def dealt_by(clients: Sequence[ClientPairs]) -> Literal["id", "group"]:
    """How training clients came to their pairs: they bear their ids, or pairs were dealt to them by
    group."""
    named = all(p.client_id == c.name for c in clients for p in c.pairs)
    return "id" if named else "group"


@dataclass(frozen=True)
class Elsewhere:
    """The clients of a federation keep their pairs: nothing can be read here."""

    generates: bool = False

    def training(self, seed: int) -> Clients:
        """Refuse: the training pairs are the clients' own."""
        self._refuse()

    def unseen(self, seed: int, context: int, seen: set[str]) -> Clients:
        """Refuse: evaluation data has to be named."""
        self._refuse()

    def held_out(self, seed: int, seen: Sequence[ClientPairs]) -> list[ClientPairs]:
        """Refuse: evaluation data has to be named."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise BadInputError(
            f"data.source: the pairs of a '{FEDERATION}' are its clients'; say which data to read"
            " here with --data"
        )


def personas(*, data: DataConfig) -> Personas:
    """Built-in users."""
    return Personas(data)


def files(*, data: DataConfig) -> Files:
    """Pairs from files."""
    return Files(data)


def elsewhere(*, data: DataConfig) -> Elsewhere:
    """Pairs that are not here."""
    return Elsewhere()


def _ungrouped(client: ClientPairs) -> ClientPairs:
    return replace(client, group=None) if client.group == "original" else client
