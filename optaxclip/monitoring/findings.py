"""What is found, one line below the other."""


class Findings(tuple):
    """A tuple that prints as its entries, one below the other; "nothing found" if it is empty.

    >>> print(Findings(("one", "two")))
    one
    two
    """

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "nothing found"
