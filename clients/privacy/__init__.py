"""Differential privacy of a run, by ``privacy.mode``: `clients.privacy.mechanism` is the seam."""

from clients.privacy.client import ClientPrivacy
from clients.privacy.distributed import DistributedClientPrivacy
from clients.privacy.example import ExamplePrivacy
from clients.privacy.mechanism import PrivacyMechanism
from fedlora.config import RunConfig

MECHANISMS: dict[str, type[PrivacyMechanism]] = {
    kind.mode: kind for kind in (PrivacyMechanism, ExamplePrivacy, ClientPrivacy)
}


def mechanism_of(config: RunConfig) -> PrivacyMechanism:
    """The mechanism of a run.

    >>> mechanism_of(RunConfig()).mode
    'none'
    """
    if config.secure.noise != "none":
        return DistributedClientPrivacy(config)
    return MECHANISMS[config.privacy.mode](config)
