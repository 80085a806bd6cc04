# SPDX-License-Identifier: Apache-2.0
"""Which Ascend products the library is for, by the name of their chip."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Support(Enum):
    """What an instance does on a product."""

    FULL = "supported"
    WARN = "not known to be supported, as Atlas A5, A3 and A2 inference products are"
    NONE = "not supported"


@dataclass(frozen=True)
class Product:
    """One row of the table.

    Attributes:
        name: What it is sold as.
        support: Whether the library is for it.
    """

    name: str
    support: Support


# The reference is for A5, A3 and for the inference products of A2. A chip's name is all that the
# runtime tells: the larger A2 chips are in training servers and in inference servers alike.
# The longest prefix counts.
_PRODUCTS: dict[str, Product] = {
    "Ascend950": Product("Atlas A5", Support.FULL),
    "Ascend910_95": Product("Atlas A5", Support.FULL),  # what older software calls it
    "Ascend910_93": Product("Atlas A3", Support.FULL),
    "Ascend910B1": Product("Atlas A2 training or inference", Support.WARN),
    "Ascend910B2": Product("Atlas A2 training or inference", Support.WARN),
    "Ascend910B3": Product("Atlas A2 training or inference", Support.WARN),
    "Ascend910B4": Product("Atlas A2 inference", Support.FULL),
    "Ascend910": Product("Atlas training series", Support.NONE),
    "Ascend310P": Product("Atlas inference series", Support.NONE),
    "Ascend310B": Product("Atlas 200I/500 A2", Support.NONE),
    "Ascend310": Product("Atlas 200/300/500 series", Support.NONE),
}
_UNKNOWN = Product("an unknown product", Support.WARN)


def product_of(chip: str) -> Product:
    """The product that has a chip of this name, such as "Ascend910B4"."""
    known = [prefix for prefix in _PRODUCTS if chip.startswith(prefix)]
    return _PRODUCTS[max(known, key=len)] if known else _UNKNOWN
