"""Where comparisons come from, by name: built-in personas, files, or elsewhere.

| source | training clients | unseen clients | new pairs of seen clients |
|---|---|---|---|
| `personas` | generated users | other generated users | generated anew |
| `files` | by `data.partition` | clients that were not trained on | by id, or dealt by group |
| `federation` | not here | not here | not here |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, NoReturn, Protocol, runtime_checkable

from fedvpa.config import FEDERATION, DataConfig
from fedvpa.data.partition import MIRRORED, ClientPairs, Partitioner, mirror_image
from fedvpa.data.personas import UNSEEN
from fedvpa.data.personas import personas as generate
from fedvpa.data.reading import pairs_by
from fedvpa.errors import BadInputError
from fedvpa.parts import SOURCES, builder, is_reference, part


class Clients(NamedTuple):
    """Clients with their pairs, and what was skipped on reading."""

    clients: list[ClientPairs]
    skipped: Counter[str]
    first_skipped: list[str]


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
        of them to be read."""
        ...

    def held_out(self, seed: int, seen: Sequence[ClientPairs]) -> list[ClientPairs]:
        """New pairs for the clients that were trained on, in their order; a client that gets none
        has an empty row."""
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
        users = generate(self.data.personas, range(self.data.clients), seed)
        return Clients(users, Counter(), [])

    def unseen(self, seed: int, context: int, seen: set[str]) -> Clients:
        """Other users, with `context` pairs and as many targets."""
        users = range(UNSEEN, UNSEEN + self.data.clients)
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
        clients = self._partitioner()(found.pairs, seed)
        return Clients(clients, found.skipped, found.first_skipped)

    def unseen(self, seed: int, context: int, seen: set[str]) -> Clients:
        """The pairs of clients that were not trained on.

        Raises:
            BadInputError: every client id of the data is among `seen`.
        """
        found = pairs_by(self.data)
        new = [p for p in found.pairs if p.client_id is None or p.client_id not in seen]
        if not new:
            raise BadInputError(
                f"{self.data.source}: every client id in it was trained on, so nobody is unseen;"
                " evaluate on other users, or leave some out of training (--clients N takes N of"
                " them)"
            )
        clients = self._partitioner()(new, seed, prefix="unseen")
        return Clients(clients, found.skipped, found.first_skipped)

    def held_out(self, seed: int, seen: Sequence[ClientPairs]) -> list[ClientPairs]:
        """A client's own pairs where ids are natural, else pairs dealt by group; mirrored clients
        get reversed pairs for their reversed halves."""
        if self.data.protocol == "mirrored":
            plain = replace(self, data=self.data.model_copy(update={"protocol": "natural"}))
            halves = [_ungrouped(c) for c in seen if not c.name.endswith(MIRRORED)]
            return [
                side
                for c in plain.held_out(seed, halves)
                for side in (replace(c, group=c.group or "original"), mirror_image(c))
            ]
        pairs = pairs_by(self.data).pairs
        named = {p.client_id for p in pairs if p.client_id is not None}
        if named & {c.name for c in seen}:
            return [
                replace(c, pairs=tuple(p for p in pairs if p.client_id == c.name)) for c in seen
            ]
        out = []
        for client in seen:
            holders = [c.name for c in seen if c.group == client.group]
            # a stranger's pairs say nothing of a client whose group is not known
            pool = [
                p
                for p in pairs
                if (p.client_id is None if client.group is None else p.group == client.group)
            ]
            own = pool[holders.index(client.name) :: len(holders)]
            out.append(replace(client, pairs=tuple(own)))
        return out

    def _partitioner(self) -> Partitioner:
        d = self.data
        return Partitioner(
            d.clients, d.partition, d.group_ratio, d.dirichlet_alpha, d.mixing, d.protocol,
            d.max_pairs,
        )  # fmt: skip


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
