from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from quantlens.allocation.choosing import pareto_front


def brute_force(costs, values):
    """(cost, value) of every choice that no other beats, by trying all."""
    sums = sorted(
        (sum(c[i] for c, i in zip(costs, pick, strict=True)), sum(v[i] for v, i in zip(values, pick, strict=True)))
        for pick in itertools.product(range(len(costs[0])), repeat=len(costs))
    )
    front, best = [], np.inf
    for cost, value in sums:
        if value < best:
            front.append((cost, value))
            best = value
    return front


tables = st.integers(1, 4).flatmap(
    lambda width: st.lists(
        st.tuples(
            st.lists(st.integers(0, 30), min_size=width, max_size=width),
            st.lists(st.integers(0, 20), min_size=width, max_size=width),
        ),
        min_size=1,
        max_size=4,
    )
)


@given(tables)
@settings(max_examples=200, deadline=None)
def test_the_front_is_that_of_all_choices(rows):
    costs, values = [r[0] for r in rows], [r[1] for r in rows]
    front = pareto_front(costs, values)
    assert list(zip(front.costs.tolist(), front.values.tolist(), strict=True)) == brute_force(costs, values)
    for cost, value, choice in zip(front.costs, front.values, front.choices, strict=True):
        assert sum(c[i] for c, i in zip(costs, choice, strict=True)) == cost
        assert sum(v[i] for v, i in zip(values, choice, strict=True)) == value


@pytest.mark.parametrize("seed", range(3))
def test_every_budget_has_the_milp_s_answer(seed):
    """24 groups of unequal cost, against HiGHS."""
    rng = np.random.default_rng(seed)
    widths = np.arange(4, 9)
    costs = rng.integers(1000, 5000, (24, 1)) * widths
    values = rng.lognormal(size=(24, 1)) * 4.0**-widths * rng.uniform(0.8, 1.2, (24, 5)) * 1e3
    front = pareto_front(costs, values)
    one_each = np.kron(np.eye(24), np.ones(5))
    for share in (0.1, 0.4, 0.8):
        budget = int(costs[:, 0].sum() * (1 - share) + costs[:, -1].sum() * share)
        found = milp(
            values.ravel(),
            integrality=np.ones(120),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs.ravel(), ub=budget)],
            options={"mip_rel_gap": 1e-9},
        )
        assert front.values[front.within(budget)] == pytest.approx(found.fun, rel=1e-6)


def test_a_budget_below_the_least_cost_has_no_point():
    front = pareto_front([[10, 20]], [[1.0, 0.5]])
    assert front.within(10) == 0
    assert front.within(19) == 0
    assert front.within(20) == 1
    assert front.within(9) == -1


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        pareto_front([[1, 2]], [[float("nan"), 1.0]])
