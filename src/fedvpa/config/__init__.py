"""Settings: what there is (`sections`), which of them a run reads (`reads`), and how layers of them
become one checked configuration (`building`)."""

from fedvpa.config.building import build_config, explain, flatten, merged, read_yaml, settings_for
from fedvpa.config.reads import settings_read
from fedvpa.config.sections import (
    BASIC,
    FEDERATION,
    Config,
    DataConfig,
    FeaturesConfig,
    FederationConfig,
    PersonasConfig,
    Section,
)

__all__ = [
    "BASIC", "FEDERATION", "Config", "DataConfig", "FeaturesConfig", "FederationConfig",
    "PersonasConfig", "Section", "build_config", "explain", "flatten", "merged", "read_yaml",
    "settings_for", "settings_read",
]  # fmt: skip
