"""The decoder of coded levels as `WIRE.md` describes it: slow and obvious, without numpy or the library."""

import zlib

COSTS = [round(2 ** (24 - byte / 16)) for byte in range(255)]


def decode(data, sizes):
    """Return the levels of all parts."""
    whole = data
    shift, owners, data = data[0] % 128, data[1 : 1 + -(-len(sizes) // 8)], data[1 + -(-len(sizes) // 8) :]
    owns = [owners[i // 8] >> i % 8 & 1 for i in range(len(sizes))]
    tables = []
    for _ in range(1 + sum(owns)):
        first, count = data[0], data[1] + 1
        tables.append([(first + i, byte) for i, byte in enumerate(data[2 : 2 + count]) if byte != 255])
        data = data[2 + count :]
    end, deflated = -(-sum(sizes) * shift // 8), whole[0] >= 128
    fields, words = int.from_bytes(data[:end], "little"), b"" if deflated else data[end:]
    numbers = iter(zlib.decompress(data[end:], -15) if deflated else b"")
    words = [int.from_bytes(words[i : i + 4], "little") for i in range(0, len(words), 4)]
    state = 0
    for _ in range(min(2, len(words))):
        state = state << 32 | words.pop()
    levels, own = [], iter(tables[1:])
    for size, owner in zip(sizes, owns, strict=True):
        table, part = next(own) if owner else tables[0], []
        symbols, starts = model(table)
        while len(part) < size:
            if deflated:
                part += symbols[next(numbers)]
                continue
            if len(symbols) == 1:
                part += symbols[0]
                continue
            low = state % 2**24
            at = max(i for i in range(len(symbols)) if starts[i] <= low)
            state = (state >> 24) * (starts[at + 1] - starts[at]) + low - starts[at]
            if state < 2**32 and words:
                state = state << 32 | words.pop()
            part += symbols[at]
        levels += part[:size]
    assert state == 0
    assert not words
    assert not list(numbers)
    return [level << shift | fields >> shift * i & (1 << shift) - 1 for i, level in enumerate(levels)]


def model(table):
    """Return the symbols, each a tuple of levels, and where each begins among 2**24 equal parts."""
    group = next(g for g in (8, 5, 4, 3, 2, 1) if len(table) ** g <= 256)
    symbols, weights = [()], [1.0]
    for _ in range(group):
        symbols = [(*symbol, level) for symbol in symbols for level, _ in table]
        weights = [weight * COSTS[byte] for weight in weights for _, byte in table]
    largest = max(weights)
    weights = [weight / largest for weight in weights]
    total = 0.0
    for weight in weights:
        total += weight
    scale, before, starts = (2**24 - len(symbols)) / total, 0.0, []
    for i, weight in enumerate(weights):
        starts.append(int(before * scale) + i)
        before += weight
    return symbols, [*starts, 2**24]
