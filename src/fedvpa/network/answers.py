"""A networked client's answers to the questions of each kind of method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from fedvpa.federated.bayes.clients import BayesClients
from fedvpa.federated.bayes.joined import MOST_FOLDS, joined_slopes, parted, parted_widths
from fedvpa.federated.clients import SimulatedClients
from fedvpa.federated.messages import section
from fedvpa.network.codes import RefusedError
from fedvpa.network.records import populations_of
from fedvpa.network.wire import Packet

S = TypeVar("S")
T = TypeVar("T")


class Answers(ABC):
    """Answers of the side of the algorithm that this client holds."""

    @abstractmethod
    def _side_of(self, kind: type[S]) -> S:
        """This client's side of a method of that kind.

        Raises:
            RefusedError: the run's method is of another kind.
        """


class SelectorAnswers(Answers):
    """What a variational selector's server asks beside training."""

    def _on_posterior(self, packet: Packet) -> Packet:
        _, found = self._side_of(SimulatedClients).posteriors(
            section(packet.tensors, "params"), withhold=packet.header["withhold"]
        )
        return Packet({}, {k: v[0] for k, v in found._asdict().items()})

    def _on_moments(self, packet: Packet) -> Packet:
        side, params = self._side_of(SimulatedClients), section(packet.tensors, "params")
        found = side.moments(params, packet.tensors["centre"], withhold=packet.header["withhold"])
        return Packet({}, dict(found._asdict()))

    def _on_scores(self, packet: Packet) -> Packet:
        found = self._side_of(SimulatedClients).scores(
            section(packet.tensors, "params"), populations_of(packet)
        )
        return Packet({}, dict(found._asdict()))


class BayesAnswers(Answers):
    """What a Bayes method's server asks."""

    def _on_outline(self, packet: Packet) -> Packet:
        fold = packet.tensors["fold"]
        found = self._side_of(BayesClients).outline(_flagged(packet), _asked(lambda: _folds(fold)))
        return Packet({}, found._asdict())

    def _on_slopes(self, packet: Packet) -> Packet:
        """Gradients of one round; asked for again, they are the same."""
        side, number = self._side_of(BayesClients), round_of(packet)
        models = _asked(lambda: parted(packet.tensors))
        ((_, found),) = side.slopes(models, [0], number, _flagged(packet))
        return Packet({"round": number}, joined_slopes(found))

    def _on_clusters(self, packet: Packet) -> Packet:
        side, (models,) = self._side_of(BayesClients), _asked(lambda: parted(packet.tensors))
        found = side.moments(models, packet.tensors["centre"], _flagged(packet))
        return Packet({}, found._asdict())

    def _on_judge(self, packet: Packet) -> Packet:
        side, models = self._side_of(BayesClients), _asked(lambda: parted(packet.tensors))
        widths = _asked(lambda: parted_widths(packet.tensors))
        reference = int(packet.tensors["reference"])
        found = side.judge(models, widths, _flagged(packet), reference)
        return Packet({}, found._asdict())

    def _on_bounded(self, packet: Packet) -> Packet:
        """Bounded gradients of one round; asked for again, they are the same."""
        side, number = self._side_of(BayesClients), round_of(packet)
        models = _asked(lambda: parted(packet.tensors))
        ((_, found),) = side.bounded(models, [0], number)
        return Packet({"round": number}, found._asdict())

    def _on_gains(self, packet: Packet) -> Packet:
        side, models = self._side_of(BayesClients), _asked(lambda: parted(packet.tensors))
        widths = _asked(lambda: parted_widths(packet.tensors))
        return Packet({}, {"gain": side.gains(models, widths)})


def round_of(packet: Packet) -> int:
    """The round that a request is about.

    Raises:
        RefusedError: it is no whole number: True and 1.5 would be other names of a round.
    """
    number = packet.header["round"]
    if type(number) is not int:
        raise RefusedError("unread", "a round that is no whole number")
    return number


def _asked(read: Callable[[], T]) -> T:
    """What a request asks about.

    Raises:
        RefusedError: it cannot be read.
    """
    try:
        return read()
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        raise RefusedError("unread", str(error)) from error


def _folds(fold: Tensor) -> Tensor:
    if fold.dim() != 1 or not 0 < len(fold) <= MOST_FOLDS:
        raise ValueError("no folds")
    return fold


def _flagged(packet: Packet) -> bool:
    return bool(packet.tensors["by_prompt"])
