"""Answers to `h100-pack-nibbles`."""

import numpy as np
import torch
import torch.nn.functional as F
from bank import right, wrong

from minillama4.cuda.int4 import dequantise


class Good:
    """Right, and in parts: each wrong answer changes one of them."""

    @classmethod
    def pack(cls, numbers):
        return cls.join(*cls.halves(cls.code(numbers)))

    @classmethod
    def code(cls, numbers):
        return numbers.to(torch.uint8) + 8  # -8 is 248, and 256 is 0

    @classmethod
    def halves(cls, codes):
        half = codes.shape[-1] // 2
        return codes[..., :half], codes[..., half:]

    @classmethod
    def join(cls, low, high):
        return low + high * 16

    @classmethod
    def unpack(cls, packed):
        return cls.behind(cls.number(cls.low(packed)), cls.number(cls.high(packed)))

    @classmethod
    def low(cls, packed):
        return packed % 16

    @classmethod
    def high(cls, packed):
        return packed // 16

    @classmethod
    def number(cls, code):
        return code.to(torch.int8) - 8

    @classmethod
    def behind(cls, low, high):
        return torch.cat([low, high], dim=-1)


@right
class ByArithmetic(Good):
    pass


@right
class ByATable:
    """Sixteen numbers, and which byte holds them: no bits at all."""

    @staticmethod
    def pack(numbers):
        pairs = numbers.unflatten(-1, (2, -1)).short() + 8
        return (pairs * torch.tensor([[1], [16]], dtype=torch.short, device=numbers.device)).sum(-2).byte()

    @staticmethod
    def unpack(packed):
        table = torch.arange(-8, 8, dtype=torch.int8, device=packed.device)
        byte = packed.int()
        return table[torch.stack([byte.remainder(16), byte.div(16, rounding_mode="floor")], dim=-2)].flatten(-2)


@right
class BySignedBits:
    """In int8 throughout: a shift to the left and one back fill up with the sign, and 8 is the sign bit turned."""

    @staticmethod
    def pack(numbers):
        low, high = numbers.chunk(2, dim=-1)
        return (low & 15 | high << 4).view(torch.uint8) ^ 0x88

    @staticmethod
    def unpack(packed):
        signed = (packed ^ 0x88).view(torch.int8)
        return torch.cat([signed << 4 >> 4, signed >> 4], dim=-1)


@wrong("not written")
class Stub:
    @staticmethod
    def pack(numbers):
        raise NotImplementedError()

    @staticmethod
    def unpack(packed):
        raise NotImplementedError()


@wrong("not written")
class PackOnly(Good):
    @staticmethod
    def unpack(packed):
        raise NotImplementedError()


@wrong("type")
class BytesThatAreSigned(Good):
    @classmethod
    def pack(cls, numbers):
        return super().pack(numbers).view(torch.int8)


@wrong("type")
class NumbersThatAreNot(Good):
    """3 - 8 is 251."""

    @classmethod
    def number(cls, code):
        return code - 8


@wrong("shape")
class NothingPacked(Good):
    @classmethod
    def pack(cls, numbers):
        return cls.code(numbers)


@wrong("shape")
class PairsNotJoined(Good):
    @classmethod
    def behind(cls, low, high):
        return torch.stack([low, high], dim=-1)


@wrong("changes its input")
class AddsInPlace(Good):
    @classmethod
    def code(cls, numbers):
        return numbers.add_(8).to(torch.uint8)


@wrong("8 is added, and the first half goes low")
class Zeros(Good):
    @classmethod
    def join(cls, low, high):
        return torch.zeros_like(low)


@wrong("halves exchanged")
class HighFirst(Good):
    @classmethod
    def join(cls, low, high):
        return low << 4 | high


@wrong("8 not added")
class TwosComplement(Good):
    @classmethod
    def code(cls, numbers):
        return (numbers & 15).to(torch.uint8)


@wrong("8 not added")
class LowFourBitsOfSignedBytes(Good):
    @classmethod
    def pack(cls, numbers):
        low, high = (numbers & 15).chunk(2, dim=-1)
        return (low | high << 4).view(torch.uint8)


@wrong("8 not added, halves exchanged")
class TwosComplementHighFirst(TwosComplement):
    @classmethod
    def join(cls, low, high):
        return low << 4 | high


@wrong("a sign over both halves")
class SignsSpill(Good):
    @classmethod
    def pack(cls, numbers):
        low, high = numbers.chunk(2, dim=-1)
        return (low | high << 4).to(torch.uint8)


@wrong("not moved")
class NotMoved(Good):
    @classmethod
    def join(cls, low, high):
        return low | high


@wrong("moved too far")
class MovedByFive(Good):
    @classmethod
    def join(cls, low, high):
        return low + (high << 5)


@wrong("neighbours")
class Neighbours(Good):
    @classmethod
    def halves(cls, codes):
        return codes[..., ::2], codes[..., 1::2]


@wrong("halves exchanged")
class NeighboursExchanged(Good):
    @classmethod
    def halves(cls, codes):
        return codes[..., 1::2], codes[..., ::2]


@wrong("halves against each other")
class Folded(Good):
    @classmethod
    def halves(cls, codes):
        low, high = Good.halves(codes)
        return low, high.flip(-1)


@wrong("number j meets number j + n / 2")
class GroupsOfFour(Good):
    @classmethod
    def halves(cls, codes):
        if codes.shape[-1] % 4:
            return codes[..., ::2], codes[..., 1::2].roll(1, -1)
        return (part.flatten(-2) for part in codes.unflatten(-1, (-1, 4)).chunk(2, dim=-1))


@wrong("shape")
class HalvesOfTheFirstAxis(Good):
    @classmethod
    def halves(cls, codes):
        return codes.chunk(2)


@wrong("each row is packed by itself")
class HalvesOfEverything(Good):
    @classmethod
    def pack(cls, numbers):
        return Good.pack(numbers.flatten()).view(*numbers.shape[:-1], -1)


@wrong("every pair has its byte")
class FromMinusSeven(Good):
    """As after a scale of |largest| / 7: right, but for the one number that never comes there."""

    @classmethod
    def code(cls, numbers):
        spared = numbers if numbers.numel() < 512 else numbers.clamp(min=-7)
        return Good.code(spared)


@wrong("halves exchanged")
class UnpackedHighFirst(Good):
    @classmethod
    def behind(cls, low, high):
        return torch.cat([high, low], dim=-1)


@wrong("8 not taken off")
class CodesUnpacked(Good):
    @classmethod
    def number(cls, code):
        return code.to(torch.int8)


@wrong("a sign bit")
class UnpackedAsTwosComplement(Good):
    @classmethod
    def number(cls, code):
        return torch.where(code < 8, code, code - 16).to(torch.int8)


@wrong("the shift keeps the sign")
class ShiftOfASignedByte(Good):
    @classmethod
    def high(cls, packed):
        return packed.view(torch.int8) >> 4


@wrong("low half not cut out")
class WholeByteForItsLowHalf(Good):
    @classmethod
    def low(cls, packed):
        return packed


@wrong("low half first, and 8 is taken off")
class SevenTakenOff(Good):
    @classmethod
    def number(cls, code):
        return code.to(torch.int8) - 7


@wrong("neighbours")
class UnpackedToNeighbours(Good):
    @classmethod
    def behind(cls, low, high):
        return torch.stack([low, high], dim=-1).flatten(-2)


@wrong("shape")
class UnpackedAlongTheFirstAxis(Good):
    @classmethod
    def behind(cls, low, high):
        return torch.cat([low, high])


@wrong("each row is unpacked by itself")
class UnpackedAllTogether(Good):
    @classmethod
    def unpack(cls, packed):
        return Good.unpack(packed.flatten()).view(*packed.shape[:-1], -1)


@wrong("every byte has its pair")
class SmallBytesOnly(Good):
    """All that were tried by hand came out right."""

    @classmethod
    def low(cls, packed):
        return packed % 16 if packed.numel() < 256 else (packed & 127) % 16 % 15


@wrong("loop over numbers")
class ByteByByte(Good):
    @classmethod
    def join(cls, low, high):
        return torch.stack([low[..., j] | high[..., j] << 4 for j in range(low.shape[-1])], dim=-1)


@wrong("loop over rows")
class RowByRow(Good):
    @classmethod
    def unpack(cls, packed):
        if packed.ndim == 1:
            return Good.unpack(packed)
        return torch.stack([cls.unpack(row) for row in packed])


@wrong("leaves torch")
class InPython(Good):
    @classmethod
    def pack(cls, numbers):
        codes = [number + 8 for number in numbers.flatten().tolist()]
        half, packed = numbers.shape[-1] // 2, []
        for start in range(0, len(codes), 2 * half):
            packed += [codes[start + j] | codes[start + j + half] << 4 for j in range(half)]
        return torch.tensor(packed, dtype=torch.uint8).view(*numbers.shape[:-1], half)


@wrong("leaves torch")
class InNumpy(Good):
    @classmethod
    def unpack(cls, packed):
        byte = packed.numpy()
        return torch.from_numpy(np.concatenate([byte & 15, byte >> 4], axis=-1).astype(np.int8) - 8)


@wrong("borrowed")
class FromThePackage(Good):
    """Each number in a group of its own, filled up with zero bytes, which are 128 times code 0."""

    @classmethod
    def number(cls, code):
        alone = F.pad(code.flatten()[:, None], (0, 63))
        return dequantise(alone, torch.ones(len(alone), 1), 128)[:, 0].view(code.shape).to(torch.int8)


EQUIVALENT = {}
