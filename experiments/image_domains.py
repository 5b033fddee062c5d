"""A contact sheet of the domains, to look at what the clients of an image federation see.

    python -m experiments.image_domains digits sheet.png

One row for each domain, two test images of each label in it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fedlora.data.builtin.image_sets import built_in_images
from fedlora.data.images import ImageData

ZOOM, GAP, MARGIN, EACH = 2, 2, 80, 2


def main(name: str, path: Path) -> None:
    """Write the sheet."""
    contact_sheet(built_in_images(name)).save(path)


def contact_sheet(data: ImageData) -> Image.Image:
    """One row for each domain, its name in front."""
    cell = ZOOM * data.test.pixels.shape[-1] + GAP
    columns = EACH * len(data.label_names)
    sheet = Image.new("L", (MARGIN + columns * cell, len(data.domain_names) * cell), 255)
    for row, domain in enumerate(data.domain_names):
        ImageDraw.Draw(sheet).text((4, row * cell + cell // 3), domain, fill=0)
        for column in range(columns):
            matches = (data.test.domains == row) & (data.test.labels == column // EACH)
            picture = Image.fromarray(data.test.pixels[np.flatnonzero(matches)[column % EACH]][0])
            place = (MARGIN + column * cell, row * cell)
            sheet.paste(picture.resize((cell - GAP, cell - GAP), Image.Resampling.NEAREST), place)
    return sheet


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
