"""Codes of a few bits, packed into 32-bit words as a little-endian stream: code k of b bits begins at bit k·b. Where 32 is not a
multiple of b, some codes cross the border of two words.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WORD_BITS = 32


def words_of(n: int, bits: int) -> int:
    """Return the words that hold a number of codes; the last word may be partly used.

    Example:
        >>> words_of(64, 3), words_of(65, 4)
        (6, 9)
    """
    return -(-n * bits // WORD_BITS)


def codes_at_word_edges(bits: int) -> int:
    """Return the multiple of codes at which a word begins.

    Example:
        >>> codes_at_word_edges(4), codes_at_word_edges(3), codes_at_word_edges(6)
        (8, 32, 16)
    """
    return WORD_BITS // math.gcd(bits, WORD_BITS)


def unpack(words: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """Return the first codes of each line.

    Args:
        words: int32 ``[lines, words]``.
        bits: of one code, 1 to 8.
        n: codes wanted of each line.

    Returns:
        Uint8 ``[lines, n]``; it may be a view.
    """
    import torch

    words = words.contiguous()
    if bits == 8:
        codes = words.view(torch.uint8)
    else:
        codes = _spread(words, bits) if 8 % bits == 0 else _streamed(words, bits)
    return codes[:, :n]


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes as words, the inverse of `unpack`. What is left of the last word is 0.

    Args:
        codes: uint8 ``[lines, n]``, each smaller than 2^bits.
        bits: of one code, 1 to 8.

    Returns:
        Int32 ``[lines, words]``; it may be a view.
    """
    import torch

    n_words = words_of(codes.shape[1], bits)
    # Eight codes become as many bytes as a code has bits.
    multiple = max(codes_at_word_edges(bits), 8)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % multiple)).contiguous()
    if bits == 4:
        # Two codes in an int16: the second moves down beside the first.
        pairs = codes.view(torch.int16)
        codes = (pairs | pairs >> 4).to(torch.uint8)
    elif bits != 8:
        codes = _narrowed(codes, bits)
    return codes.view(torch.int32)[:, :n_words]


def _narrowed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the bytes of codes ``[lines, n]`` as a stream, eight of them at a time; n is a multiple of 8."""
    import torch

    wide = codes.view(torch.int64)
    for size in (8, 16, 32):
        # Of each two fields the upper one moves down to the used bits of the lower.
        used = size * bits // 8
        low = sum(((1 << used) - 1) << at for at in range(0, 64, 2 * size))
        wide = (wide & low) | (wide >> size - used & low << used)
    return wide.view(torch.uint8).view(len(codes), -1, 8)[:, :, :bits].flatten(1).contiguous()


def whole_codes(levels: torch.Tensor) -> torch.Tensor:
    """Return whole numbers from 0 to 255 as uint8."""
    import torch

    # By way of int16, which takes a quarter of the time.
    return levels.to(torch.int16).to(torch.uint8)


def along_lines(words: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Return the columns ``first`` to ``last`` of a matrix as lines: ``[rows, columns]`` becomes ``[last - first, rows]``.

    What is packed along the first axis can be unpacked afterwards.
    """
    import torch

    # Two copies, each of whole cache lines, take a sixth of the time of one that reads scattered words. The second is a
    # `clone`, since `contiguous` leaves the strides of a matrix with one column as they are, and then it has no view as bytes.
    return words[:, first:last].contiguous().T.clone(memory_format=torch.contiguous_format)


def _spread(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack codes of 1, 2 or 4 bits: each byte becomes an integer with one byte for each code."""
    import torch

    per_byte = 8 // bits
    wide = words.view(torch.uint8).to({2: torch.int16, 4: torch.int32, 8: torch.int64}[per_byte])
    spread = wide.clone()
    for k in range(1, per_byte):
        # Code k moves from bit k·bits to bit 8·k.
        spread |= wide << k * (8 - bits)
    spread &= sum(((1 << bits) - 1) << 8 * k for k in range(per_byte))
    return spread.view(torch.uint8)


def _streamed(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack codes of which some cross the border of two words. The pattern repeats after some whole words."""
    import torch

    n_codes = codes_at_word_edges(bits)
    n_words = n_codes * bits // WORD_BITS
    # A stream may end within the pattern.
    padded = torch.nn.functional.pad(words, (0, -words.shape[1] % n_words))
    words = padded.view(len(padded), -1, n_words)
    codes = torch.empty(*words.shape[:2], n_codes, dtype=torch.uint8, device=words.device)
    for k in range(n_codes):
        word, at = divmod(k * bits, WORD_BITS)
        code = words[..., word] >> at
        here = WORD_BITS - at
        if here < bits:
            # The shift has filled the upper bits with copies of the sign.
            code = (code & ((1 << here) - 1)) | (words[..., word + 1] << here)
        codes[..., k] = code & ((1 << bits) - 1)
    return codes.flatten(1)
