"""Published figures, as data, and how far the plan is from them."""
