"""PostgreSQL's extended hash functions, bit for bit, with seed 0.

A key's place on the ring must be the same whether PostgreSQL computes it in a CHECK
constraint or Python computes it to route a statement. So this is a port of Bob
Jenkins' lookup3 as PostgreSQL has it in ``src/common/hashfn.c``
(``hash_bytes_extended``, ``hash_bytes_uint32_extended``) and of the wrappers in
``src/backend/access/hash/hashfunc.c``. The ``hash_*`` functions return signed values,
as SQL shows them; the ``slot_*`` functions return the ring's slot, 0 to 4095.

A slot is computed for every routed statement, so the code below is straight lines: a
call or a loop per step would cost more than the step. ``x * 0x100000001 >> 32 - k`` is
x rotated left by k bits, with bits above the 32nd that the next mask takes away: one
operation less than two shifts joined. A mask is left out where the next makes up for
it.
"""

from __future__ import annotations

from struct import Struct

__all__ = ["hash_bytes", "hash_int8", "slot_bytes", "slot_int8"]

_INIT = 0x9E3779B9 + 3923095
_three_words = Struct("<3I").iter_unpack


def _lookup3(key: bytes) -> int:
    """Return ``hash_any_extended(key, 0)`` as an unsigned 64-bit integer."""
    size = len(key)
    a = b = c = (_INIT + size) & 0xFFFFFFFF
    tail = size % 12
    for w0, w1, w2 in _three_words(key[:-tail] if tail else key):
        a += w0
        b += w1
        c = (c + w2) & 0xFFFFFFFF
        a = ((a - c) ^ (c * 0x100000001 >> 28)) & 0xFFFFFFFF
        c += b
        b = ((b - a) ^ (a * 0x100000001 >> 26)) & 0xFFFFFFFF
        a += c
        c = ((c - b) ^ (b * 0x100000001 >> 24)) & 0xFFFFFFFF
        b += a
        a = ((a - c) ^ (c * 0x100000001 >> 16)) & 0xFFFFFFFF
        c += b
        b = ((b - a) ^ (a * 0x100000001 >> 13)) & 0xFFFFFFFF
        a += c
        c = ((c - b) ^ (b * 0x100000001 >> 28)) & 0xFFFFFFFF
        b += a
    if tail:
        rest = key[-tail:]
        a += int.from_bytes(rest[:4], "little")
        b += int.from_bytes(rest[4:8], "little")
        # The lowest byte of c is left to the length, so c's tail starts a byte higher.
        c += int.from_bytes(rest[8:], "little") << 8
    b &= 0xFFFFFFFF
    c = ((c ^ b) - (b * 0x100000001 >> 18)) & 0xFFFFFFFF
    a = ((a ^ c) - (c * 0x100000001 >> 21)) & 0xFFFFFFFF
    b = ((b ^ a) - (a * 0x100000001 >> 7)) & 0xFFFFFFFF
    c = ((c ^ b) - (b * 0x100000001 >> 16)) & 0xFFFFFFFF
    a = ((a ^ c) - (c * 0x100000001 >> 28)) & 0xFFFFFFFF
    b = ((b ^ a) - (a * 0x100000001 >> 18)) & 0xFFFFFFFF
    return b << 32 | ((c ^ b) - (b * 0x100000001 >> 8)) & 0xFFFFFFFF


def _signed(value: int) -> int:
    return (value ^ 1 << 63) - (1 << 63)


def hash_bytes(key: bytes) -> int:
    """Return ``hashtextextended`` of UTF-8 text, ``uuid_hash_extended`` of 16 bytes."""
    return _signed(_lookup3(key))


def slot_bytes(key: bytes) -> int:
    """Return the slot of a key's bytes."""
    return _lookup3(key) >> 52 ^ 2048


def hash_int8(key: int) -> int:
    """Return ``hashint8extended(key, 0)`` of a signed 64-bit *key*."""
    # Folding the high half in lets smallint, integer and bigint of one value agree.
    high = key >> 32
    low = (key ^ (high if key >= 0 else ~high)) & 0xFFFFFFFF
    return _signed(_lookup3(low.to_bytes(4, "little")))


# Of a 4-byte key only a depends on the key, so the first steps start from constants.
_A0 = (_INIT + 4) & 0xFFFFFFFF
_C1 = (0 - (_A0 * 0x100000001 >> 18)) & 0xFFFFFFFF
_A1 = _C1 * 0x100000001 >> 21


def slot_int8(key: int) -> int:
    """Return the slot of a signed 64-bit *key*."""
    high = key >> 32
    if high:
        key ^= high if key >= 0 else ~high
    a = (((_A0 + key) & 0xFFFFFFFF ^ _C1) - _A1) & 0xFFFFFFFF
    b = ((_A0 ^ a) - (a * 0x100000001 >> 7)) & 0xFFFFFFFF
    c = ((_C1 ^ b) - (b * 0x100000001 >> 16)) & 0xFFFFFFFF
    a = ((a ^ c) - (c * 0x100000001 >> 28)) & 0xFFFFFFFF
    return (((b ^ a) - (a * 0x100000001 >> 18)) & 0xFFFFFFFF ^ 0x80000000) >> 20
