"""A pseudo-random order that needs no memory: what the order of training batches is made of."""

FEISTEL_ROUNDS = 8


def permuted(place: int, size: int, seed: int, epoch: int) -> int:
    """Image of `place` under a pseudo-random permutation of range(size), chosen by (seed, epoch), in O(1) memory.

    A Feistel network over the smallest even number of bits that holds `size`, walked until it lands inside (Black and
    Rogaway 2002). Defined here and not by a library, so that a resumed run has the same order under every version.
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    key = mix(mix(seed) ^ epoch)
    while True:
        left, right = place >> half, place & mask
        for round_number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (mix(key + (right << 8) + round_number) & mask)
        place = left << half | right
        if place < size:
            return place


def mix(value: int) -> int:
    """splitmix64's finaliser: 64 bits to 64 bits, every input bit moves every output bit."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31
