"""``prove``: Theorem 1 of TransMLA in numbers, on the weights of a real model."""

from mlakit.theorem.measure import Pairs, Proof, prove
from mlakit.theorem.picture import draw_proof
from mlakit.theorem.view import print_proof

__all__ = ["Pairs", "Proof", "draw_proof", "print_proof", "prove"]
