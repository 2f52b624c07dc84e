"""What a server is told."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from fedvpa.errors import BadInputError

Scope = Literal["chat", "user", "admin"]
SCOPES: tuple[Scope, ...] = ("chat", "user", "admin")
"""What a key may do: chat under named preferences; besides, all that concerns one user; everything
for everybody."""
LEAST_SECRET = 32
"""Characters of a secret that signs tokens."""


class ServingSettings(BaseModel):
    """Settings of `fedvpa serve`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    directory: str = Field(description="a policy's folder, or a run's (then its base model serves)")
    host: str = Field("127.0.0.1", description="address to listen at")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        8000, description="its port (0: a free one)"
    )
    store: str = Field(
        "", description="database of users, as sqlite:///users.db or postgresql://...; default:"
        " users.db in the folder",
    )  # fmt: skip
    base: str = Field(
        "", description="base model of a run without a policy (default: its backbone)"
    )
    device: str = Field("auto", description="torch device: auto, cpu, cuda, ...")
    rows: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="answers side by side")
    waiting: Annotated[int, Field(ge=0, le=100_000)] = Field(
        64, description="requests that wait; one more is told to come back"
    )
    most_tokens: Annotated[int, Field(ge=1)] = Field(
        512, description="tokens of an answer, at most, and where a request names no number"
    )
    best_of: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = Field(
        "auto",
        description="drafts of which the selector chooses, where a request names no number; auto:"
        " 1, of a run without a policy 4",
    )
    texts: Literal["keep", "forget"] = Field(
        "keep", description="keep the texts of comparisons, or their features alone"
    )
    most_comparisons: Annotated[int, Field(ge=1)] = Field(
        500, description="comparisons of a user, at most"
    )
    most_bytes: Annotated[int, Field(ge=1024)] = Field(
        1 << 20, description="size of a request, at most"
    )
    rate: Annotated[float, Field(gt=0)] = Field(
        600.0, description="requests per key and minute, at most"
    )
    bank: str = Field("", description="pairs among which the next question is chosen (file)")
    origins: tuple[str, ...] = Field((), description="web pages elsewhere that may ask (CORS)")
    secret: str = Field("", description="file of the secret that signs preferences kept by users")

    @field_validator("origins", mode="before")
    @classmethod
    def _by_commas(cls, given: Any) -> Any:
        return tuple(o for o in given.split(",") if o) if isinstance(given, str) else given

    @property
    def url(self) -> str:
        """URL of the database."""
        return self.store or f"sqlite:///{Path(self.directory).resolve() / 'users.db'}"

    @property
    def shown_url(self) -> str:
        """The same without a password."""
        return re.sub(r"//([^:@/]*):[^@/]*@", r"//\1:***@", self.url)

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def signing_secret(self) -> bytes | None:
        """The secret that signs tokens (None: there are no tokens).

        Raises:
            BadInputError: the file cannot be read, or is too short to keep anybody out.
        """
        if not self.secret:
            return None
        try:
            found = Path(self.secret).read_bytes().strip()
        except OSError as error:
            raise BadInputError(f"--secret {self.secret}: {error.strerror}") from error
        if len(found) < LEAST_SECRET:
            raise BadInputError(
                f"--secret {self.secret}: {len(found)} bytes; at least {LEAST_SECRET}, as `openssl"
                " rand -hex 32` writes them"
            )
        return found
