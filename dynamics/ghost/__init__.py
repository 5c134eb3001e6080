"""Per-example gradients without the gradients: their norms and inner products ("ghost norms").

``factors(loss, params, shared, examples)`` of any jax function of one example, then ``norms`` or
``products``.
"""

from dynamics.ghost.algebra import norms, products
from dynamics.ghost.factors import Factors, factors
from dynamics.ghost.independent import check_independent

__all__ = ["Factors", "check_independent", "factors", "norms", "products"]
