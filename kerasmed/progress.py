"""One kind of progress bar for all that takes long: plain characters, at most a line a second, also in logs."""

import sys

from tqdm import tqdm


def bar(total: int, what: str, *, unit: str = "it", done: int = 0, shown: bool = True, file=None) -> tqdm:
    """Make a progress bar, to be used in a `with` and told of progress by `update`.

    Args:
        total: how much there is to do.
        what: a word that stands before the bar.
        unit: of what is counted.
        done: how much an earlier call has done already.
        shown: False for no bar.
        file: where it is written; None for standard output, where papermill keeps it in the order of what is printed.

    Returns:
        The bar.

    Example:
        >>> with bar(3, "count", shown=False) as counted:
        ...     for _ in range(3):
        ...         counted.update()
    """
    return tqdm(
        total=total,
        initial=done,
        unit=unit,
        desc=what,
        file=file or sys.stdout,
        disable=not shown,
        mininterval=1,
        ascii=True,
        ncols=80,
    )
