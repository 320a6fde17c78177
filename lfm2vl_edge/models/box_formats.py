"""How models were trained to be asked for boxes: the formats by name, for those whose files do not say.

The texts are those of the published model cards and of the vision pages of Liquid AI's documentation, word for word:
a model answers best to what it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from lfm2vl_edge.config import FRACTION_BOXES, BoxFormat
from lfm2vl_edge.errors import ConfigError, shorten

SHORT_BOXES: Final = BoxFormat(question="Detect {what}.", everything="all objects", article=True)
"""For a model that was trained on questions in few words."""
THOUSAND_BOXES: Final = BoxFormat(
    system="When asked for bounding boxes for objects, return a valid JSON array.\n"
    "Each array item must be an object with:\n"
    "- image_id: the 0-based index of the image\n"
    "- bbox_2d: [xmin, ymin, xmax, ymax] normalized integer coordinates in [0, 1000]\n"
    "- label: a concise label you choose for the predicted object or region\n"
    "\n"
    "Return one item per visible matching object or region. Return [] if none are visible.",
    question="Provide bounding boxes for {what}.",
    everything="all objects",
    article=True,
    key="bbox_2d",
    scale=1000,
    image_key="image_id",
)
"""LFM2.5-VL-3B: the prompt of its documentation for detection and grounding."""
LAYOUT_BOXES: Final = BoxFormat(
    question="Parse this document into its layout regions. The pages are provided as images in reading order. For "
    "every region, in reading order across all pages, output a header line immediately followed by the region's "
    "content:\n"
    "\n"
    "image_index=<n> <label> [xmin, ymin, xmax, ymax]\n"
    "<content>\n"
    "\n"
    "where:\n"
    "- image_index is the zero-based index of the page image the region appears on (0 for the first image, 1 for the "
    "second, and so on)\n"
    "- <label> is one of these layout labels: text, title, list, table, table_caption, table_footnote, image, "
    "image_block, image_caption, image_footnote, chart, equation, formula_number, code, code_caption, algorithm, "
    "aside_text, ref_text, phonetic, page_header, page_footer, page_number, page_footnote\n"
    "- [xmin, ymin, xmax, ymax] are normalized integer coordinates in [0, 1000]\n"
    "- <content> is the region's content: plain text for text regions, LaTeX for equations, OTSL for tables, and a "
    "short description for images and charts\n"
    "\n"
    "Separate each region block with one blank line. Return only the parsed regions.\n",
    key="bbox_2d",
    scale=1000,
    image_key="image_index",
    is_layout=True,
)
"""LFM2.5-VL-3B: the prompt of its documentation for the layout of a document."""
PIXEL_BOXES: Final = BoxFormat(
    question="Detect all instances of: {what}. Response must be a JSON array: "
    '[{"label": ..., "bbox_2d": [x1, y1, x2, y2]}, ...]. Coordinates are pixels of the image.',
    key="bbox_2d",
    scale=0,
)
"""For a model that was trained on pixels of the image as it was given."""
BOX_FORMATS: Final[Mapping[str, BoxFormat]] = {
    "fractions": FRACTION_BOXES,
    "thousandths": THOUSAND_BOXES,
    "layout": LAYOUT_BOXES,
    "pixels": PIXEL_BOXES,
    "short": SHORT_BOXES,
}
"""Name -> format."""


def box_format(boxes: BoxFormat | str) -> BoxFormat:
    """Return a format, or the one of a name.

    Raises:
        ConfigError: no format has that name.
    """
    if isinstance(boxes, BoxFormat):
        return boxes
    if not isinstance(boxes, str) or boxes not in BOX_FORMATS:
        raise ConfigError(f"boxes is {shorten(boxes)}; it must be a BoxFormat, or one of {', '.join(BOX_FORMATS)}")
    return BOX_FORMATS[boxes]
