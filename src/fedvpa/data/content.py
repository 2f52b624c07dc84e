"""What a client's pairs share: responses and prompts, by which they are divided without a leak.

A pair that shares a response with another one is no fresh evidence beside it: a z inferred from the
one has seen half of the other. Under ``content: new``, context and targets share no response (nor a
prompt, where a client has enough of them). Contents are known by their hashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from fedvpa.records import PreferencePair

ENOUGH = 4
"""A client with so many groups of pairs that share nothing is divided by these groups."""

Policy = Literal["new", "repeated"]
"""Whether context and targets may share responses."""
Integers = NDArray[np.int64]


class Units(NamedTuple):
    """What is dealt when a client's pairs are divided: each pair hangs on two units (often one and
    the same) and belongs to a side if both fall to it. Numbered within each client.

    `left` and `right` have an entry per row, `pairs` one per unit: how many pairs hang on it where
    units are groups of pairs, else 1. Client c owns the units offset[c] to offset[c+1].
    """

    left: Integers
    right: Integers
    pairs: NDArray[np.float32]
    offset: Integers


def contents(pairs: Sequence[PreferencePair]) -> Integers:
    """Hashes of every pair's prompt, chosen and rejected response (the response to its prompt), [n,
    3]."""
    return np.array([pair.content_hashes() for pair in pairs], dtype=np.int64).reshape(-1, 3)


def units_of(content: Integers | None, offset: Integers, policy: Policy) -> Units:
    """The units of many clients at once.

    Args:
        content: hashes of prompt, chosen and rejected response, [rows, 3] (None: no two pairs
            share any).
        offset: client c owns the rows offset[c] to offset[c+1].
        policy: under `repeated` every pair is a unit. Under `new` a unit is a group of pairs that
            share no prompt and no response with others, or, where a client has fewer than `ENOUGH`
            of these, no response; where it has fewer of these, too, every response is one, and
            pairs whose responses fall to different sides belong to neither.
    """
    rows, clients = int(offset[-1]), len(offset) - 1
    owner = np.repeat(np.arange(clients), np.diff(offset))
    pair = np.arange(rows)
    if policy == "repeated" or content is None:
        return _numbered(pair, pair, owner, clients, np.ones(clients, bool))
    # 1. Groups of pairs that share neither prompt nor response, and those that share no response.
    joined, apart, chosen, rejected = _groups(content, owner)
    # 2. Each client is divided by the first kind of which it has enough.
    enough = np.minimum(ENOUGH, np.diff(offset))
    by_joined = _count(owner, joined, clients) >= enough
    grouped = by_joined | (_count(owner, apart, clients) >= enough)
    group = np.where(by_joined[owner], joined, rows + apart)
    # 3. The others deal their responses.
    shift = 2 * rows
    left = np.where(grouped[owner], group, shift + chosen)
    right = np.where(grouped[owner], group, shift + rejected)
    return _numbered(left, right, owner, clients, grouped)


def groups_apart(content: Integers) -> Integers:
    """Groups [n] of one client's pairs that share no prompt and no response, or, if all pairs hang
    together that way, no response."""
    joined, apart, _, _ = _groups(content, np.zeros(len(content), np.int64))
    return joined if len(np.unique(joined)) > 1 else apart


def _groups(content: Integers, owner: Integers) -> tuple[Integers, Integers, Integers, Integers]:
    """Of every row: the group that shares neither prompt nor response with others, the group that
    shares no response, and the numbers of its two responses."""
    rows = len(owner)
    prompt = _within(owner, content[:, 0])
    both = _within(np.concatenate([owner, owner]), content[:, 1:].T.reshape(-1))
    chosen, rejected = both[:rows], both[rows:]
    apart = _joined(rows, [chosen, rejected])
    # prompts are another kind of link, with numbers of their own
    return _joined(rows, [chosen, rejected, 2 * rows + prompt]), apart, chosen, rejected


def seen_before(content: Integers, known: Integers) -> Integers:
    """How many of each row's two responses (0, 1, 2) are among those of the known rows, of one
    client."""
    return np.isin(content[:, 1:], known[:, 1:]).sum(1)


def _within(owner: Integers, values: Integers) -> Integers:
    """Numbers of the distinct (owner, value)."""
    order = np.lexsort((values, owner))
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(owner[order]) != 0) | (np.diff(values[order]) != 0)
    out = np.empty(len(order), np.int64)
    out[order] = np.cumsum(new) - 1
    return out


def _joined(rows: int, links: Sequence[Integers]) -> Integers:
    """Groups of rows that are connected by what they hang on."""
    if not rows:
        return np.zeros(0, np.int64)
    start = np.concatenate([np.arange(rows)] * len(links))
    end = rows + np.concatenate(links)
    size = int(end.max()) + 1
    graph = coo_matrix((np.ones(len(start), np.int8), (start, end)), shape=(size, size))
    return connected_components(graph, directed=False)[1][:rows].astype(np.int64)


def _count(owner: Integers, group: Integers, clients: int) -> Integers:
    distinct = np.unique(np.stack([owner, group]), axis=1)
    return np.bincount(distinct[0], minlength=clients)


def _numbered(
    left: Integers, right: Integers, owner: Integers, clients: int, grouped: NDArray[np.bool_]
) -> Units:
    """Units numbered from 0 within each client."""
    rows = len(owner)
    twice = np.concatenate([owner, owner])
    number = _within(twice, np.concatenate([left, right]))
    count = int(number.max()) + 1 if rows else 0
    holder = np.empty(count, np.int64)
    holder[number] = twice
    offset = np.concatenate([[0], np.bincount(holder, minlength=clients).cumsum()])
    pairs = np.bincount(number[:rows], minlength=count).astype(np.float32)
    pairs[~grouped[holder]] = 1.0
    local = number - offset[twice]
    return Units(local[:rows], local[rows:], pairs, offset)
