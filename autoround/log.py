"""The package's logger; nothing is configured on import."""

import logging

LOGGER = logging.getLogger("autoround")
