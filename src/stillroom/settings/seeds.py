"""One number from several, so that every draw of a run has a seed of its own."""

_MASK = (1 << 64) - 1


def seed_of(*parts: int | str) -> int:
    """63 well-mixed bits (splitmix64). Torch's CPU generator reads only the low 32, so they must be mixed too."""
    h = 0
    for part in parts:
        n = int.from_bytes(part.encode(), "little") if isinstance(part, str) else part
        while True:
            h = (h ^ (n & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
            h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & _MASK
            h = (h ^ h >> 27) * 0x94D049BB133111EB & _MASK
            h ^= h >> 31
            n >>= 64
            if n in (0, -1):
                break
    return h >> 1
