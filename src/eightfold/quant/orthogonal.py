"""Orthogonal matrices that spread one large channel over all: Hadamard where there is one, random elsewhere.

    Q = diag(signs) (F_1 x F_2 x ...) / sqrt(size)         x: Kronecker product; signs: random, of a fixed seed

    F        size         entries
    H_2      2            1, 1; 1, -1, and Kronecker products of it
    Paley I  q + 1        1 + S,  S = (0, 1; -1, chi(i - j))                       q prime, q mod 4 = 3
    Paley II 2 (q + 1)    C x (1, 1; 1, -1) + 1 x (1, -1; -1, -1),  C = (0, 1; 1, chi(i - j))    q prime, q mod 4 = 1
    random   an odd rest  the Q of a QR decomposition of normal numbers

chi(a) is 1 for squares modulo q, -1 for others, 0 for 0.

Sources: Paley 1933, On orthogonal matrices; QuaRot, Ashkboos et al. 2024, arXiv:2404.00456 (randomized Hadamard
matrices for residual streams).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST = 64  # a power of two is applied in steps of at most this size: fewer products, and still few passes


@dataclass(frozen=True)
class Orthogonal:
    """An orthogonal matrix Q of (size, size), as its factors.

    Attributes:
        signs: (size,) float32, 1 and -1.
        factors: orthogonal, float32, whose Kronecker product is what follows the signs.
    """

    signs: Tensor
    factors: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        return len(self.signs)

    def columns(self, x: Tensor) -> Tensor:
        """Return x Q over the last dimension, whose size is a multiple of Q's: each run of it is turned alike."""
        y, after = x.reshape(-1, self.size) * self.signs.to(x.device), self.size
        for factor in self.factors:
            after //= len(factor)
            y = factor.T.to(x.device) @ y.reshape(-1, len(factor), after)
        return y.reshape(x.shape)

    def rows(self, x: Tensor) -> Tensor:
        """Return Q^T x over the first dimension, as `columns` does over the last."""
        if x.dim() == 1:
            return self.columns(x)
        return self.columns(x.T).T.contiguous()


@functools.lru_cache(maxsize=4)
def random_orthogonal(size: int, seed: int) -> Orthogonal:
    """Return a random orthogonal matrix; of the same size and seed, the same one."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator, device="cpu").mul(2).sub(1).to(torch.float32)
    factors = [factor.to(torch.float64) for factor in _factors(size, generator)]
    return Orthogonal(signs, tuple((factor / _length(factor)).to(torch.float32) for factor in factors))


def _length(factor: Tensor) -> float:
    """Return the length of its rows: all have the same."""
    return float(torch.linalg.vector_norm(factor[0]))


def _factors(size: int, generator: torch.Generator) -> list[Tensor]:
    power = size & -size
    odd = size // power
    for small in (4 * odd, 8 * odd) if odd > 1 else ():
        if size % small == 0 and (found := paley(small)) is not None:
            return [found, *_sylvester(size // small)]
    if odd == 1:
        return _sylvester(size)
    random = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64, device="cpu")).Q
    return [random, *_sylvester(power)]


def _sylvester(size: int) -> list[Tensor]:
    """Return Hadamard matrices whose Kronecker product is that of a power of two; none for 1."""
    if size == 1:
        return []
    if size > _LARGEST:
        return [*_sylvester(_LARGEST), *_sylvester(size // _LARGEST)]
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device="cpu")
    return [functools.reduce(torch.kron, [two] * (size.bit_length() - 1))]


def paley(size: int) -> Tensor | None:
    """Return a Hadamard matrix by one of Paley's constructions, (size, size) of 1 and -1; None where none has it."""
    if _is_prime(size - 1) and (size - 1) % 4 == 3:
        core = _conference(size - 1)
        core[1:, 0] = -1
        return core + torch.eye(size, device="cpu")
    half = size // 2
    if size % 2 == 0 and _is_prime(half - 1) and (half - 1) % 4 == 1:
        plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        return torch.kron(_conference(half - 1), plus) + torch.kron(torch.eye(half), minus)
    return None


def _conference(q: int) -> Tensor:
    """Return (q + 1, q + 1): 0 in the corner, ones beside it, and chi(i - j)."""
    squares = {i * i % q for i in range(1, q)}
    chi = torch.tensor([0.0, *(1.0 if i in squares else -1.0 for i in range(1, q))], device="cpu")
    differences = (torch.arange(q, device="cpu")[:, None] - torch.arange(q, device="cpu")) % q
    found = torch.ones(q + 1, q + 1, device="cpu")
    found[0, 0], found[1:, 1:] = 0, chi[differences]
    return found


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
