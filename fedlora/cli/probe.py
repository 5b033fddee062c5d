"""``fedlora probe``: the line that adapters of an image backbone have to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlora.cli.console import marked, one_line_errors, out, percent
from fedlora.cli.runs import ConfigFile, Overrides
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.config import RunConfig
    from fedlora.models.vision.probe import Probe


@one_line_errors
def probe(config: ConfigFile, set_: Overrides = []) -> None:  # noqa: B006
    """How far the frozen image backbone gets with nothing but the best linear head.

    All clients' training images in one place, logistic regression until it converges, the run's test images.

    Example: fedlora probe images.toml --set model.name=vit
    (fedlora example images > images.toml writes such a file)
    """
    from fedlora.config import parse_overrides, read_config

    settings = read_config(config, parse_overrides(set_))
    found = _probed(settings)
    for domain, accuracy in found.by_domain.items():
        out.print(f"{domain}: {percent(accuracy)}")
    out.print(marked(f"linear probe of {settings.model.name}", f": accuracy {percent(found.accuracy)}"))


def _probed(settings: RunConfig) -> Probe:
    from fedlora.data.image_reader import image_format
    from fedlora.models import build_model
    from fedlora.models.vision.probe import linear_probe
    from fedlora.tasks.images import ImageClassification

    if settings.task != ImageClassification.name:
        raise ConfigError(
            f"task = {settings.task!r}: fedlora probe is for {ImageClassification.name!r}, whose "
            "backbone's features go to a linear head; elsewhere run strategy.name=head-only"
        )
    task, form = ImageClassification(), image_format(settings.model.name)
    data = task.images(settings.data, form)
    model = build_model(settings.model, len(data.label_names), settings.seed, task.network)
    return linear_probe(model, data, form)
