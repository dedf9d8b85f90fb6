"""The words that a generated shop is made of."""

from __future__ import annotations

from dataclasses import dataclass


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split(", "))


@dataclass(frozen=True, slots=True)
class Range:
    """A category, the words its products are named with, and their prices in cents."""

    slug: str
    name: str
    styles: tuple[str, ...]
    nouns: tuple[str, ...]
    cheapest: int
    dearest: int


RANGES = (
    Range(
        "kitchen",
        "Kitchen",
        _listed("Enamel, Steel, Copper, Cast-iron, Ceramic"),
        _listed("kettle, saucepan, mixing bowl, teapot, casserole, milk jug"),
        900,
        8900,
    ),
    Range(
        "lighting",
        "Lighting",
        _listed("Brass, Opal glass, Paper, Black steel, Rattan"),
        _listed("desk lamp, floor lamp, wall light, pendant, lantern"),
        1900,
        18900,
    ),
    Range(
        "furniture",
        "Furniture",
        _listed("Oak, Beech, Walnut, Painted, Folding"),
        _listed("chair, stool, bookshelf, side table, bench, coat stand"),
        4900,
        49900,
    ),
    Range(
        "garden",
        "Garden",
        _listed("Zinc, Terracotta, Green, Hardwood, Small"),
        _listed("watering can, plant pot, trowel, bird feeder, trough"),
        700,
        5900,
    ),
    Range(
        "stationery",
        "Stationery",
        _listed("Ruled, Plain, Cork, Leather, Recycled"),
        _listed("notebook, pencil case, desk tray, folder, calendar"),
        300,
        3900,
    ),
    Range(
        "textiles",
        "Textiles",
        _listed("Wool, Linen, Striped, Cotton, Checked"),
        _listed("blanket, cushion, tablecloth, bath towel, rug"),
        1200,
        9900,
    ),
    Range(
        "toys",
        "Toys",
        _listed("Wooden, Painted, Pocket, Giant, Classic"),
        _listed("train, kite, jigsaw puzzle, spinning top, puppet"),
        800,
        6900,
    ),
)

FIRST_NAMES = _listed(
    "Anna, Ben, Clara, David, Emma, Felix, Grace, Henry, Ines, Jonas, Laura, Maria, "
    "Noah, Olivia, Paul, Rosa, Samuel, Sofia, Thomas, Yasmin"
)
LAST_NAMES = _listed(
    "Adams, Baker, Carter, Diaz, Evans, Fischer, Garcia, Hughes, Jansen, Keller, "
    "Lopez, Martin, Novak, Olsen, Parker, Rossi, Schmidt, Silva, Taylor, Weber"
)
STREETS = _listed("Station Road, Mill Lane, Church Street, Park Avenue, High Street")

# Cities, and their postal codes but for two digits.
CITIES = (
    ("Amsterdam", "10{:02} AB"),
    ("Berlin", "10{:02}5"),
    ("Lisbon", "1{:02}0-004"),
    ("Vienna", "1{:02}0"),
)
