"""Computes the Levenshtein distance between two texts, counting inserted, deleted and replaced characters."""


def edit_distance(first: str, second: str) -> int:
    """Return the edit distance between two texts, computed with bit vectors (Myers 1999, in the form of Hyyrö 2003).

    Each column of the dynamic programming table is stored as one integer. Comparing answers of thousands of characters
    takes milliseconds; a nested loop would take seconds.
    """
    if not first or not second:
        return len(first) + len(second)
    places: dict[str, int] = {}
    for place, letter in enumerate(first):
        places[letter] = places.get(letter, 0) | 1 << place
    last, every = 1 << (len(first) - 1), (1 << len(first)) - 1
    rises, falls, distance = every, 0, len(first)  # down the column, from one row to the next
    for letter in second:
        equal = places.get(letter, 0)
        diagonal = ((((equal & rises) + rises) ^ rises) | equal | falls) & every
        right_rises, right_falls = (falls | ~(diagonal | rises)) & every, diagonal & rises
        distance += bool(right_rises & last) - bool(right_falls & last)
        right_rises, right_falls = (right_rises << 1 | 1) & every, (right_falls << 1) & every
        rises, falls = (right_falls | ~(diagonal | right_rises)) & every, right_rises & diagonal
    return distance
