# SPDX-License-Identifier: Apache-2.0
"""Numbers of things in sentences."""


def counted(count: int, what: str) -> str:
    """`1 image`, `1,200 images`, `2 batches`."""
    plural = f"{what}es" if what.endswith(("s", "ch")) else f"{what}s"
    return f"{count:,} {what if count == 1 else plural}"
