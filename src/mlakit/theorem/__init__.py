"""``prove``: Theorem 1 of TransMLA in numbers, on the weights of a real model."""

from mlakit.theorem.measure import Pairs, Proof, prove
from mlakit.theorem.picture import draw_proof
from mlakit.theorem.view import tell_proof

__all__ = ["Pairs", "Proof", "draw_proof", "prove", "tell_proof"]
