"""Settings: what there is (`sections`), which of them a run reads (`reads`), and how layers of them
become one checked configuration (`building`)."""

from fedvpa.config.building import (
    build_config,
    explain,
    flatten,
    merged,
    read_yaml,
    settings_for,
    what_is_read,
)
from fedvpa.config.inputs import (
    FEDERATION,
    MADE,
    DataConfig,
    FeaturesConfig,
    PersonasConfig,
    Section,
    Seed,
)
from fedvpa.config.reads import (
    BASIC,
    leaf_settings,
    settings_read,
    settings_readable,
    short_names,
    value_of,
)
from fedvpa.config.sections import Config, FederationConfig

__all__ = [
    "BASIC",
    "FEDERATION",
    "MADE",
    "Config",
    "DataConfig",
    "FeaturesConfig",
    "FederationConfig",
    "PersonasConfig",
    "Section",
    "Seed",
    "build_config",
    "explain",
    "flatten",
    "leaf_settings",
    "merged",
    "read_yaml",
    "settings_for",
    "settings_read",
    "settings_readable", "short_names",
    "value_of",
    "what_is_read",
]  # fmt: skip
