"""Client side by the name that it has in an installed wheel; in a checkout it lies in ``clients/``."""

from clients import *  # noqa: F403
from clients import __all__ as __all__
