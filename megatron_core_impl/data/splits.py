"""Which documents of a dataset are for training, for validation and for the test at the end."""

from math import inf


def split_shares(split: str) -> tuple[float, float, float]:
    """The shares of train, valid and test that a text such as "969,30,1" (or with "/") gives; missing ones are 0.

    Raises:
        ValueError: it gives none.
    """
    try:
        shares = [float(part) for part in split.split("," if "," in split else "/")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(0 <= share < inf for share in shares) or sum(shares) == 0:
        raise ValueError(f'split {split!r} must be up to three shares of train, valid and test such as "969,30,1"')
    train, valid, test = [*shares, 0.0, 0.0][:3]
    return train, valid, test


def split_documents(split: str, n: int) -> tuple[range, range, range]:
    """The train, valid and test documents of a file of n: contiguous, in the file's order.

    The shares need not sum to anything. Rounding is the reference's: half to even, what is left over moves all borders.

    Raises:
        ValueError: `split` gives no shares.
    """
    shares = split_shares(split)
    borders = [0]
    for share in shares:
        borders.append(borders[-1] + round(share / sum(shares) * n))
    excess = borders[-1] - n
    train, valid, test = (max(0, border - excess) for border in borders[1:])
    return range(train), range(train, valid), range(valid, test)
