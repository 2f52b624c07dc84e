"""Settings of a federation's server and of each of its clients; read from `server.yaml` and
`client.yaml`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from fedvpa.config import (
    FEDERATION,
    Config,
    FeaturesConfig,
    Section,
    build_config,
    explain,
    merged,
    read_yaml,
)
from fedvpa.errors import BadInputError
from fedvpa.methods import DEFAULT, entry_of

logger = logging.getLogger("fedvpa")

T = TypeVar("T", bound=Section)

LEAST_EXPECTED = 20
"""Clients that a random cohort has on average, with secure sums: fewer than three are then as
good as never drawn."""

Port = Annotated[int, Field(gt=0, lt=65536)]


class FeaturesKnown(Section):
    """What a client's log says of the features that it reads."""

    signature: str = Field(description="the backbone's signature")
    width: Annotated[int, Field(gt=0, le=1 << 16)] = Field(description="numbers of one feature")


class ServerSettings(Section):
    """Who takes part, and how long the server waits for them. Paths are relative to the folder of
    `server.yaml`."""

    clients: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="names of all clients, in a fixed order"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: Port = Field(9092, description="port to listen on")
    run: str = Field("run", description="directory of the run: checkpoint, history, manifest")
    min_clients: Annotated[int, Field(ge=0)] = Field(
        0, description="connected clients that a round needs (0: all)"
    )
    min_replies: Annotated[int, Field(ge=0)] = Field(
        0, description="replies that a round needs (0: all of the cohort)"
    )
    grace: Annotated[float, Field(ge=0)] = Field(
        10.0, description="seconds to wait for the others after that many"
    )
    timeout: Annotated[float, Field(gt=0)] = Field(
        120.0, description="seconds to wait for replies at the most"
    )
    attempts: Annotated[int, Field(ge=1)] = Field(
        5, description="how often a round is asked for before the run stops"
    )
    secure: bool = Field(
        False, description="secure aggregation: the server sees sums over clients alone"
    )
    features: FeaturesKnown | None = Field(
        None, description="features of the clients, for a server without the backbone"
    )
    training: dict[str, Any] = Field(
        default_factory=dict, description="settings as of `fedvpa train`; data stay out of it"
    )


class ClientSettings(Section):
    """One client: what it is called, where its pairs are and where it keeps its state. Paths are
    relative to its file."""

    name: str = Field(description="the name the server knows it by")
    data: str = Field(
        description="file or folder of its preference pairs; they do not leave this machine"
    )
    split: str | None = Field(None, description="only files called SPLIT.*")
    columns: dict[str, str] = Field(
        {}, description="fields under other names, as {prompt: question}"
    )
    server: str = Field("127.0.0.1:9092", description="host:port of the server")
    root_certificate: str | None = Field(
        None, description="certificate authority that the server's certificate is signed by"
    )
    key: str | None = Field(
        None, description="private key (OpenSSH) that this node proves itself with"
    )
    state: str = Field("state", description="folder for its private state")
    backbone: str = Field(
        FeaturesConfig().backbone,
        description="the only backbone that this client reads its pairs with: a name as of"
        " features.backbone, NAME@REVISION of a Hub's repository, or a folder",
    )
    device: str = Field("cpu", description="torch device of the backbone")
    parts: tuple[str, ...] = Field(
        (), description="parts from outside of fedvpa (module:NAME) that the server may ask for"
    )
    pairs: Literal["fixed", "may-change"] = Field(
        "fixed",
        description="may-change: this client goes on in a run after its pairs have changed, and in"
        " runs that divide the pairs otherwise or read other features of them",
    )
    secure_only: bool = Field(
        False, description="refuse every request that would show this client's own numbers"
    )


RETIRED: dict[type[Section], tuple[str, ...]] = {
    ClientSettings: ("runtime_port", "certificate", "certificate_key")
}
"""Settings of older projects, which nothing reads any longer."""


def read_settings(path: Path, model: type[T]) -> T:
    """Read and check a settings file.

    Raises:
        BadInputError: unreadable, unknown names, or bad values.
    """
    given = read_yaml(path)
    for name in RETIRED.get(model, ()):
        if given.pop(name, None) is not None:
            logger.info("%s: %s: is not read any longer; remove it", path, name)
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise BadInputError(
            f"{path}: " + "; ".join(explain(e, model) for e in error.errors())
        ) from error


def training_config(settings: ServerSettings) -> Config:
    """The configuration that the clients train with.

    Raises:
        BadInputError: bad settings, or a method that has no private latent to learn.
    """
    data = settings.training.get("data", {})
    extra = sorted(set(data) - {"validation_share", "public"})
    if extra:
        raise BadInputError(
            f"training.data.{extra[0]}: the data are the clients' (client.yaml says where they"
            " are); remove it"
        )
    given = settings.training | {
        "data": {"source": FEDERATION, "clients": len(settings.clients), **data}
    }
    given = {"method": DEFAULT} | given
    # nobody's latent is shown to anybody, unless asked for
    entry = entry_of(given["method"], str(given.get("preset", "default")))
    if entry.latent and not entry.summed:
        given = merged({"prior": {"kind": "components"}}, given)
    config = build_config(given)
    if not config.entry.networked:
        raise BadInputError(
            f"training.method: {config.method} does not run as a federation of variational"
            " selectors"
        )
    if len(set(settings.clients)) < len(settings.clients):
        twice = next(name for name in settings.clients if settings.clients.count(name) > 1)
        raise BadInputError(f"clients: '{twice}' is named twice")
    for name in ("min_clients", "min_replies"):
        if getattr(settings, name) > len(settings.clients):
            raise BadInputError(
                f"{name}: {getattr(settings, name)}, but there are {len(settings.clients)} clients"
            )
    f = config.federation
    summed = config.entry.summed or (
        config.prior.kind == "components"
        and f.aggregation == "uniform"
        and f.aggregator == "mean"
        and not f.max_norm
    )
    if settings.secure and not summed:
        raise BadInputError(
            "secure: only sums over clients are known; it goes with prior.kind components, uniform"
            " aggregation, and the mean"
        )
    if settings.secure and config.privacy.enabled:
        expected = min(1.0, (f.cohort or len(settings.clients)) / len(settings.clients)) * len(
            settings.clients
        )
        if expected < LEAST_EXPECTED:
            raise BadInputError(
                f"secure with privacy: a random cohort of {expected:g} clients on average is at"
                f" times too small for a secure sum; federation.cohort: at least {LEAST_EXPECTED}"
            )
    return config
